"""Which names are the hub's: only those become links in a card."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_NAME = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9][\w.-]{0,95}/\w([\w.-]{0,94}\w)?", re.ASCII)
_FILES = (".json", ".jsonl", ".parquet", ".csv", ".tsv", ".txt", ".gz", ".zst", ".zip", ".arrow", ".yaml")


def is_hub_name(name: Any, near: Path) -> bool:
    """Whether `name` is `owner/name` as the hub takes it, and no path: neither by its ending nor below any
    directory that holds `near`, from which the command may have been given.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name.lower().endswith(_FILES):
        return False
    return not any((parent / name).exists() for parent in (Path.cwd(), *near.absolute().parents))
