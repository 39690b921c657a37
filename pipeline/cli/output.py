"""What a command prints: results on stdout, what it has to say on stderr."""

from __future__ import annotations

import json
import sys
from typing import Any

from distily.safety.console import SafeConsole
from distily.text import printable


def console(stderr: bool = False, quiet: bool = False) -> SafeConsole:
    """Where tables and progress go."""
    return SafeConsole(stderr=stderr, quiet=quiet)


def say(line: str) -> None:
    """Print a line on stderr."""
    console(stderr=True).print(printable(line), highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """The same value on stdout; what would steer a terminal is escaped, as JSON writes it."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    sys.stdout.write("".join(one if one == "\n" else _escaped(one) for one in text) + "\n")


def _escaped(letter: str) -> str:
    # Such a letter stands in a string: all else in JSON is ASCII.
    return letter if printable(letter) == letter else json.dumps(letter)[1:-1]
