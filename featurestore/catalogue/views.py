"""Columns over all samples of a manifest, read where they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt
from numpy.lib.mixins import NDArrayOperatorsMixin

if TYPE_CHECKING:
    from featurestore.catalogue.catalogue import Catalogue

Indices = npt.NDArray[np.int64]


class Without(Sequence[int]):
    """The numbers from 0 to total - 1 without some of them, ascending; takes the memory of these alone.

    excluded: ascending int64, each once.
    """

    def __init__(self, total: int, excluded: npt.ArrayLike) -> None:
        self.total = total
        self.excluded = np.asarray(excluded, np.int64)
        # How many are left before each that is not.
        self._before = self.excluded - np.arange(len(self.excluded))

    def __len__(self) -> int:
        return self.total - len(self.excluded)

    @overload
    def __getitem__(self, place: int) -> int: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[int]: ...
    def __getitem__(self, place: int | slice) -> int | Sequence[int]:
        if isinstance(place, slice):
            start, stop, step = place.indices(len(self))
            if (start, step) != (0, 1):
                return [self[p] for p in range(start, stop, step)]
            count = self[stop] if stop < len(self) else self.total
            return Without(count, self.excluded[self.excluded < count])
        if not -len(self) <= place < len(self):
            raise IndexError(f"place {place} of {len(self)}")
        place %= len(self)
        return place + int(np.searchsorted(self._before, place, side="right"))

    def __contains__(self, number: object) -> bool:
        if not isinstance(number, int) or not 0 <= number < self.total:
            return False
        at = int(np.searchsorted(self.excluded, number))
        return at == len(self.excluded) or int(self.excluded[at]) != number

    def __iter__(self) -> Iterator[int]:
        start = 0
        for end in [*self.excluded.tolist(), self.total]:
            yield from range(start, end)
            start = end + 1

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Without):
            return self.total == other.total and np.array_equal(self.excluded, other.excluded)
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def at(self, places: Indices) -> Indices:
        """int64: the numbers at these places."""
        found: Indices = places + np.searchsorted(self._before, places, side="right")
        return found


class SampleIds(Sequence[str]):
    """The ids of all samples, 32 hex digits each, read from the segments as they are asked for."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue

    def __len__(self) -> int:
        return len(self._catalogue)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number, place = self._catalogue.place(index + len(self) * (index < 0))
        return bytes(self._catalogue.segment(number).columns["sample"][place]).hex()

    def __iter__(self) -> Iterator[str]:
        for part in self.parts():
            for sample in part:
                yield bytes(sample).hex()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"SampleIds({len(self)})"

    def parts(self) -> Iterator[npt.NDArray[np.uint8]]:
        """The ids as bytes, uint8 [n, 16], some hundred thousand at a time."""
        yield from self._catalogue.columns("sample")


class Lengths(NDArrayOperatorsMixin):
    """The number of tokens of each sample, read from the segments as they are asked for.

    `lengths[i]` is an int, `lengths[array]` and `lengths[a:b]` are int64 arrays. For numpy, operators
    included, the whole is an array of int64, which then lies in memory.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue

    def __len__(self) -> int:
        return len(self._catalogue)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice | Indices | Sequence[int]) -> Indices: ...
    def __getitem__(self, index: int | slice | Indices | Sequence[int]) -> int | Indices:
        if isinstance(index, slice):
            index = np.arange(*index.indices(len(self)))
        if not isinstance(index, (int, np.integer)):
            return self._at(np.asarray(index, np.int64))
        number, place = self._catalogue.place(int(index) + len(self) * (index < 0))
        return int(self._catalogue.segment(number).columns["length"][place])

    def __iter__(self) -> Iterator[int]:
        for part in self.parts():
            yield from part.tolist()

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        whole = np.concatenate([np.zeros(0, np.int64), *self.parts()])
        return whole.astype(dtype or np.int64)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        arrays = (np.asarray(one) if isinstance(one, Lengths) else one for one in inputs)
        return getattr(ufunc, method)(*arrays, **options)

    def __repr__(self) -> str:
        return f"Lengths({len(self)})"

    def parts(self) -> Iterator[npt.NDArray[np.int32]]:
        """The lengths as int32 arrays, some hundred thousand at a time."""
        yield from self._catalogue.columns("length")

    def max(self) -> int:
        """The greatest length."""
        return self._catalogue.longest

    def sum(self) -> int:
        """Tokens of all samples."""
        return self._catalogue.rows

    def tolist(self) -> list[int]:
        """All of them as a list."""
        return list(self)

    def _at(self, indices: Indices) -> Indices:
        found = np.empty(len(indices), np.int64)
        segments = np.searchsorted(self._catalogue.starts, indices, side="right") - 1
        for number in np.unique(segments).tolist():
            here = np.flatnonzero(segments == number)
            segment = self._catalogue.segment(number)
            places = segment.kept.at(indices[here] - self._catalogue.starts[number])
            found[here] = segment.columns["length"][places]
        return found
