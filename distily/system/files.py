"""Files that a reader finds whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_whole(path: Path, text: str, errors: str = "strict") -> None:
    """Write a file beside `path` and rename it there, in UTF-8: a run that is killed, or a disk that is full,
    leaves what was there before. errors: as of `str.encode`.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8", errors=errors) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """`write_whole` of a JSON document."""
    write_whole(path, json.dumps(value, indent=2) + "\n")
