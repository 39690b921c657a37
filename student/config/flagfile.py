"""Flags of `from-cache` as a mapping, as recipes and sweeps write them in YAML, to a command line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from student.errors import UserError


def command_line(flags: Mapping[str, Any], where: str) -> list[str]:
    """{"learning-rate": 1e-3, "bf16": True, "student-model-config": {...}} -> ["--learning-rate", "0.001",
    "--bf16", "True", "--student-model-config", "{...}"]. Lists are joined by commas, null leaves a flag out.

    UserError, naming `where`, for a name or value that can be no flag.
    """
    words: list[str] = []
    for name, value in flags.items():
        if not isinstance(name, str) or not name or name.startswith("-"):
            raise UserError(f"{where}: {name!r} is no flag; write its name without dashes in front")
        if value is not None:
            words += [f"--{name.replace('_', '-')}", word(value, f"{where}: {name}")]
    return words


def word(value: Any, where: str) -> str:
    """One value as the word behind its flag."""
    if isinstance(value, Mapping):
        try:
            return json.dumps(value)
        except (TypeError, ValueError) as error:  # a date, or an anchor that holds itself
            raise UserError(f"{where} cannot be the value of a flag: {error}") from error
    if isinstance(value, list) and all(isinstance(item, (int, float, str)) for item in value):
        return ",".join(str(item) for item in value)
    if isinstance(value, (bool, int, float, str)):
        return str(value)
    raise UserError(f"{where} cannot be the value of a flag: {value!r}")
