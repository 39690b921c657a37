"""How the line that says why a teacher cannot be captured gets from vLLM's processes to the command.

A worker that raised would take vLLM down with pages of traces, so it leaves the line in a file and goes on.
"""

from __future__ import annotations

import os
from pathlib import Path

_VARIABLE = "DISTILY_COMPLAINT"


def listen_at(file: Path) -> None:
    """In the command: where the engine's processes are to leave their line."""
    os.environ[_VARIABLE] = str(file)


def complain(error: Exception) -> None:
    """In an engine process: what is captured from here on is of no use, for this reason."""
    Path(os.environ[_VARIABLE]).write_text(str(error), encoding="utf-8")
