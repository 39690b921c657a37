"""How the line that says why a teacher cannot be captured gets from vLLM's processes to the command.

vLLM itself only says that one of its processes ended.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.capture.watch import in_driver
from pipeline.errors import EngineError

_VARIABLE = "DISTILY_COMPLAINT"


def listen_at(file: Path) -> None:
    """In the command: where the engine's processes are to leave their line."""
    os.environ[_VARIABLE] = str(file)


@contextmanager
def told_to_driver() -> Iterator[None]:
    """In an engine process: an EngineError becomes the line in that file, and a quiet end of the process."""
    try:
        yield
    except EngineError as error:
        if in_driver():
            raise
        Path(os.environ[_VARIABLE]).write_text(str(error), encoding="utf-8")
        raise SystemExit(1) from error
