"""What an array of a column group looks like, and the sizes that it follows from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from featurestore.format.schema import TeacherIdentity

Stats = dict[str, int | float]

VALUES_PER_CHUNK = 8_192


@dataclass(frozen=True, kw_only=True)
class ArrayLayout:
    """One array of a group: its shape, numpy dtype, rows per inner chunk, compression, attributes."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunk_rows: int
    compressed: bool
    attributes: Mapping[str, str | int]


@dataclass(frozen=True, kw_only=True)
class Extent:
    """The sizes that the shapes of a group's arrays follow from."""

    rows: int
    samples: int
    entries: int
    distinct_ids: int
    vocab_size: int
    hidden_size: int

    @classmethod
    def of(cls, lengths: Sequence[int], stats: Stats, identity: TeacherIdentity) -> Extent:
        """The sizes of a group with these `stats`, of a task whose samples have these lengths."""
        return cls(
            rows=sum(lengths),
            samples=len(lengths),
            entries=int(stats.get("entries", 0)),
            distinct_ids=int(stats.get("distinct_ids", 0)),
            vocab_size=identity.vocab_size,
            hidden_size=identity.hidden_size,
        )


def shard_key(layout: ArrayLayout) -> str:
    """Where the only shard of an array lies: c/0 or c/0/0."""
    return "/".join(["c", *("0" for _ in layout.shape)])


def compressed(
    shape: tuple[int, ...],
    dtype: npt.DTypeLike,
    chunk: int = VALUES_PER_CHUNK,
    attributes: Mapping[str, str | int] | None = None,
) -> ArrayLayout:
    """A compressed array with `chunk` rows in an inner chunk."""
    return ArrayLayout(
        shape=shape, dtype=np.dtype(dtype), chunk_rows=chunk, compressed=True, attributes=attributes or {}
    )
