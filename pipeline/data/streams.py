"""Data sets that are read from the beginning to the end: local files of any kind but text, and the hub.

Nothing is counted, indexed or converted before, so that the first rows are there at once whatever the size.
What is known of columns is what the first rows have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from distily.datafiles import RowFile
from distily.errors import DataFileError
from distily.text import one_line
from pipeline.data.bad_rows import Unusable
from pipeline.errors import RequestError

Row = dict[str, Any] | Unusable
# Rows that are looked at for columns and types.
_HEAD_ROWS = 1000
# Rows and characters that a shuffle holds at most.
_SHUFFLED_ROWS, _SHUFFLED_SIZE = 10_000, 2**25


class RowStream(Protocol):
    """Rows in order. share: how much of them the iteration that began last has read, None where unknown."""

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[Row]: ...
    def share(self) -> float | None: ...


class FileStream:
    """The rows of local files, one file after the other."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files
        self._sizes = [max(file.stat().st_size, 1) for file in files]
        self._before = 0
        self._open: RowFile | None = None

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[Row]:
        """All rows; of tables with a schema only these columns are read.

        Raises:
            RequestError: a file cannot be read.
        """
        self._before = 0
        for file, size in zip(self._files, self._sizes, strict=True):
            try:
                with RowFile(file, columns) as self._open:
                    for value in self._open:
                        yield _row(value)
            except DataFileError as error:
                raise RequestError(f"DATASET {file}: cannot be loaded: {error}") from error
            self._before, self._open = self._before + size, None

    def share(self) -> float:
        """Of the bytes of the files, about."""
        return (self._before + (self._open.bytes_read() if self._open else 0)) / sum(self._sizes)


class HubStream:
    """The rows of a split on the hub, as `datasets` streams them."""

    def __init__(self, dataset: str, config: str | None, split: str) -> None:
        import datasets

        datasets.logging.set_verbosity(datasets.logging.CRITICAL)
        self._dataset, self._read = dataset, 0
        with _Readable(dataset):
            self._table = datasets.load_dataset(dataset, config, split=split, streaming=True)
        known = (self._table.info.splits or {}).get(split)
        self._count = known.num_examples if known else 0

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[Row]:
        """All rows, or these columns of them."""
        table = self._table if columns is None else self._table.select_columns(list(columns))
        with _Readable(self._dataset):
            for self._read, row in enumerate(table):
                yield row

    def share(self) -> float | None:
        """Of the rows that the data set's card counts."""
        return self._read / self._count if self._count else None


class _Readable:
    """RequestError for whatever `datasets` raises."""

    def __init__(self, dataset: str) -> None:
        self._dataset = dataset

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception):
            cause = one_line(error.__cause__ or error)
            raise RequestError(f"DATASET {self._dataset}: cannot be loaded: {cause}") from error


def head_of(stream: RowStream) -> dict[str, set[type]]:
    """Column -> types of its values, without null, in the first rows; columns in the order they are met.

    Raises:
        RequestError: there are rows, and none of them can be used.
    """
    types: dict[str, set[type]] = {}
    first: Unusable | None = None
    for row in islice(stream.rows(), _HEAD_ROWS):
        if isinstance(row, Unusable):
            first = first or row
            continue
        for name, value in row.items():
            types.setdefault(name, set()).update([type(value)] if value is not None else [])
    if first is not None and not types:
        raise RequestError(
            f"DATASET: its first line {first.reason}, and so do all of the first {_HEAD_ROWS:,}"
        )
    return types


class StreamValues:
    """What `pick` makes of the rows of a stream, in order, or shuffled within a buffer by `seed`."""

    def __init__(
        self,
        stream: RowStream,
        columns: Sequence[str],
        pick: Callable[[dict[str, Any]], Any],
        seed: int | None,
    ) -> None:
        self._stream, self._columns, self._pick, self._seed = stream, columns, pick, seed

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        values = (
            (f"row {number}", row if isinstance(row, Unusable) else self._pick(row))
            for number, row in enumerate(self._stream.rows(self._columns))
        )
        return values if self._seed is None else shuffled(values, self._seed)


def shuffled(values: Iterable[tuple[str, Any]], seed: int) -> Iterator[tuple[str, Any]]:
    """The values in an order that depends on the seed: each waits in a buffer until one is drawn for it.

    The buffer holds 10,000 values, fewer where they are long texts.
    """
    random = np.random.default_rng(seed)
    buffer: list[tuple[str, Any]] = []
    held = 0
    for value in values:
        buffer.append(value)
        held += _size(value[1])
        while len(buffer) > _SHUFFLED_ROWS or (held > _SHUFFLED_SIZE and len(buffer) > 1):
            place = int(random.integers(len(buffer)))
            buffer[place], buffer[-1] = buffer[-1], buffer[place]
            drawn = buffer.pop()
            held -= _size(drawn[1])
            yield drawn
    yield from (buffer[place] for place in random.permutation(len(buffer)))


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str) else len(repr(value))


def _row(value: Any) -> Row:
    if isinstance(value, Exception):
        return Unusable(f"is no JSON: {one_line(value, 100)}")
    return value if isinstance(value, dict) else Unusable("is no JSON object")
