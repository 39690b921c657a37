"""YAML files of ours: plain data only, and a key that occurs twice is an error."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml

from student.errors import UserError


def parse_yaml(text: str, where: str) -> Any:
    """What a YAML text says; UserError, naming `where`, when it is no YAML."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} occurs twice", node.start_mark
                )
        return super().construct_mapping(node, deep)
