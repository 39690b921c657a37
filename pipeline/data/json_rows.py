"""Rows of JSON files, one object a line or an array of them, in any order; no copy is made.

Only where each line begins is in memory. A line that is no object is a row that cannot be used, and not the
end of the run: what is made of it is up to the reader.
"""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from distily.datafiles import is_packed, json_array, parse_line, unpack
from distily.errors import DataFileError
from distily.text import one_line
from pipeline.data.bad_rows import Unusable
from pipeline.errors import RequestError

# Rows between two calls of the listener.
_ROWS_PER_CALL = 1000
_Source = Path | IO[bytes] | list[Any]


class JsonRows:
    """The rows of `files`, one file after the other; blank lines are none.

    All of them are parsed once, to know the columns. Compressed files are unpacked into an unnamed temporary
    file. column_names: in the order in which they are met. types: of the values in each column, without null.

    Raises:
        RequestError: a file that cannot be read, or in which no line is a JSON object.
    """

    def __init__(self, files: Sequence[Path], listen: Callable[[int], None] = lambda rows: None) -> None:
        self._sources: list[_Source] = []
        self._unpacked: IO[bytes] | None = None
        self.types: dict[str, set[type]] = {}
        self._listen = listen
        numbers, places = array("q"), array("q")
        for file in files:
            try:
                self._scan(file, numbers, places)
            except DataFileError as error:
                raise RequestError(f"DATASET {file}: cannot be loaded: {error}") from error
            except OSError as error:
                raise RequestError(f"DATASET {file}: cannot be read: {error.strerror}") from error
        # int64 [N]: which source a row is in, and where: its first byte, or its index in an array.
        self._numbers: npt.NDArray[np.int64] = np.asarray(numbers, np.int64)
        self._places: npt.NDArray[np.int64] = np.asarray(places, np.int64)

    @property
    def column_names(self) -> list[str]:
        """All names that some row has."""
        return list(self.types)

    def __len__(self) -> int:
        return len(self._numbers)

    def rows(self, indices: Sequence[int]) -> Iterator[dict[str, Any] | Unusable]:
        """The rows with these numbers."""
        with ExitStack() as stack:
            opened: dict[int, IO[bytes]] = {}
            for index in indices:
                number, place = int(self._numbers[index]), int(self._places[index])
                source = self._sources[number]
                if isinstance(source, list):
                    yield _row(source[place])
                    continue
                if isinstance(source, Path) and number not in opened:
                    opened[number] = stack.enter_context(source.open("rb"))
                file = opened.get(number) or source
                assert not isinstance(file, Path)
                file.seek(place)
                yield _parsed(file.readline())

    def _scan(self, path: Path, numbers: array[int], places: array[int]) -> None:
        before = len(places)
        if not is_packed(path):
            with path.open("rb") as file:
                rows = json_array(file)
                found = self._index(file, path, rows, numbers, places)
        else:
            target = self._unpacked = self._unpacked or tempfile.TemporaryFile()  # noqa: SIM115  (it goes with this)
            start = target.seek(0, 2)
            unpack(path, target)
            target.seek(start)
            rows = json_array(target)
            found = self._index(target, target, rows, numbers, places)
        if len(places) > before and isinstance(found, Unusable):
            raise DataFileError(f"its first line {found.reason}, and no other line is a JSON object")

    def _index(
        self,
        file: IO[bytes],
        source: Path | IO[bytes],
        rows: list[Any] | None,
        numbers: array[int],
        places: array[int],
    ) -> Unusable | None:
        """Note where the rows are; returns what is wrong with the first when it is wrong with each."""
        number = len(self._sources)
        self._sources.append(source if rows is None else rows)
        first: Unusable | None = None
        good = False
        for place, row in _placed(file) if rows is None else enumerate(map(_row, rows)):
            numbers.append(number)
            places.append(place)
            if isinstance(row, Unusable):
                first = first or row
            else:
                good = True
                for name, value in row.items():
                    types = self.types.setdefault(name, set())
                    if value is not None:
                        types.add(type(value))
            if len(places) % _ROWS_PER_CALL == 0:
                self._listen(len(places))
        return None if good else first


def _placed(file: IO[bytes]) -> Iterator[tuple[int, dict[str, Any] | Unusable]]:
    """(first byte, row) of each line that is not blank."""
    place = file.tell()
    for line in file:
        if line.strip():
            yield place, _parsed(line)
        place += len(line)


def _parsed(line: bytes) -> dict[str, Any] | Unusable:
    try:
        return _row(parse_line(line))
    except (ValueError, RecursionError) as error:
        return Unusable(f"is no JSON: {one_line(error, 100)}")


def _row(value: Any) -> dict[str, Any] | Unusable:
    return value if isinstance(value, dict) else Unusable("is no JSON object")
