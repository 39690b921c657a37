"""YAML that users write: plain data only, and no key twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distily.safety import parsing
from distily.text import one_line
from student.errors import UserError


def read_yaml(path: str, where: str, what: str) -> Any:
    """What a file holds; UserError, beginning with `where`, unless it is YAML. what: to be given instead."""
    try:
        with Path(path).open("rb") as file:
            # One more than is possible: what has it is too large.
            data = file.read(parsing.MAX_YAML + 1)
        text = data.decode() if len(data) <= parsing.MAX_YAML else None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where} cannot be read ({error}); give {what}") from error
    if text is None:
        raise UserError(f"{where} has more than {parsing.MAX_YAML:,} bytes; give {what}")
    return parse_yaml(text, where)


def parse_yaml(text: str, where: str) -> Any:
    """What a text stands for; UserError as of `read_yaml`."""
    try:
        return parsing.parse_yaml(text)
    except ValueError as error:
        raise UserError(f"{where} is not valid YAML: {one_line(error, None)}") from error
