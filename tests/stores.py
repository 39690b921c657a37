"""What tests compare of a store."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np

from featurestore.reader import CacheReader

T = TypeVar("T")


def lasting(files: Mapping[str, T]) -> dict[str, T]:
    """Of files by their name in a store those that stay for ever: all but the head, which says what manifest
    is the newest.
    """
    return {name: file for name, file in files.items() if not name.startswith("heads/")}


def contents(store: Path) -> dict[bytes, bytes]:
    """Every bit of the features of each sample, by its tokens."""
    reader = CacheReader.open(store)
    found: dict[bytes, bytes] = {}
    for index in range(len(reader)):
        sample = reader.read(index)
        values = (value for features in sample.features.values() for value in vars(features).values())
        found[sample.tokens.tobytes()] = b"".join(np.asarray(value).tobytes() for value in values)
    return found
