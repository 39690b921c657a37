"""YAML that users write: plain data only, and no key twice."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from distily.text import one_line
from student.errors import UserError


def read_yaml(path: str, where: str, what: str) -> Any:
    """What a file holds; UserError, beginning with `where`, unless it is YAML. what: to be given instead."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where} cannot be read ({error}); give {what}") from error
    return parse_yaml(text, where)


def parse_yaml(text: str, where: str) -> Any:
    """What a text stands for; UserError as of `read_yaml`."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not valid YAML: {one_line(error, None)}") from error


class _Loader(yaml.SafeLoader):
    """Plain data only, and a key that occurs twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} occurs twice", node.start_mark
                )
        return super().construct_mapping(node, deep)
