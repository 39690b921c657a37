"""Memory that runs out: how libraries say so, and one line in place of their traceback."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from distily.text import one_line
from pipeline.errors import EngineError

OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|MemoryError|Cannot allocate|_ALLOC_FAILED", re.I
)


@contextmanager
def memory_for(doing: str, fix: str) -> Iterator[None]:
    """What is done inside may take more memory than there is; other errors pass.

    Raises:
        EngineError: it did; the line says while `doing` what, and the `fix`.
    """
    try:
        yield
    except Exception as error:  # torch raises RuntimeError, Python MemoryError, mmap OSError
        if not isinstance(error, MemoryError) and not OUT_OF_MEMORY.search(str(error)):
            raise
        raise EngineError(f"out of memory while {doing} ({one_line(error)}); {fix}") from error
