"""Samples of a cache by their indices, looked at a part at a time: no list of all of them is made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from featurestore.catalogue.views import Lengths, Without

_PART = 2**20

Indices = npt.NDArray[np.int64]


def indices_at(indices: Sequence[int], places: Indices) -> Indices:
    """int64: the indices at these places of a sequence of indices."""
    if isinstance(indices, Without):
        return indices.at(places)
    if isinstance(indices, range):
        return indices.start + places * indices.step
    return np.fromiter((indices[place] for place in places.tolist()), np.int64, len(places))


def lengths_of(lengths: Lengths, indices: Sequence[int]) -> Iterator[Indices]:
    """int64: the lengths of these samples, in their order, a part at a time."""
    for start in range(0, len(indices), _PART):
        places = np.arange(start, min(start + _PART, len(indices)))
        yield lengths[indices_at(indices, places)]


def longest_places(
    lengths: Lengths, indices: Sequence[int], count: int, enough: int | None = None
) -> list[int]:
    """The places in `indices` of the `count` longest samples, of equals the first; all of `enough` positions
    count as equal.
    """
    best = np.zeros((0, 2), np.int64)
    start = 0
    for part in lengths_of(lengths, indices):
        known = part if enough is None else np.minimum(part, enough)
        own = np.stack([known, np.arange(start, start + len(part))], axis=1)
        best = np.concatenate([best, own])
        best = best[np.argsort(-best[:, 0], kind="stable")[:count]]
        start += len(part)
    return [int(place) for place in best[:, 1]]
