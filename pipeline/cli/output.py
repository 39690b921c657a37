"""What a command prints: results on stdout, what it has to say on stderr."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console


def say(line: str) -> None:
    Console(stderr=True).print(line, highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
