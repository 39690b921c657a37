"""What a command prints: results on stdout, what it has to say on stderr."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console


def console(stderr: bool = False, quiet: bool = False) -> Console:
    """Where tables and progress go; names of files, teachers and tokens are never markup there."""
    return Console(stderr=stderr, markup=False, emoji=False, quiet=quiet)


def say(line: str) -> None:
    """Print a line on stderr."""
    console(stderr=True).print(line, highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
