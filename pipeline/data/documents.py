"""Data sets as documents: local files and folders, saved `datasets`, and names on the hub."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from distily.datafiles import kind_of, read_text
from distily.errors import DataFileError
from pipeline.data.bad_rows import Unusable
from pipeline.data.chat_layouts import (
    ALPACA_COLUMNS,
    CONVERSATIONS_COLUMN,
    MESSAGES_COLUMN,
    TEXT_COLUMN,
    alpaca_messages,
)
from pipeline.data.data_folder import find_files, pieces_of, split_names
from pipeline.data.json_rows import JsonRows
from pipeline.data.streams import FileStream, HubStream, RowStream, StreamValues, head_of
from pipeline.data.tables import hub_table, joined, local_table, saved_table
from pipeline.errors import RequestError

_BATCH_ROWS = 256
# Local files of so many bytes together are read as a stream, where nothing speaks against it.
_STREAMED_BYTES = 2**30
# Told how many rows have been read so far.
Listener = Callable[[int], None]


@dataclass(frozen=True)
class Documents:
    """What a data set holds, in the order in which it is read.

    chats: the values are conversations, unchecked, as they lie in the column; else they are texts.
    column: where they are, for an error. values: pairs of where a value is ("row 3"; rows count from 0), and
    the value, `Unusable` where it cannot be read; each iteration begins with the first. share: how much of
    the data set the iteration that began last has read, from 0 to 1; None where that is not known.
    """

    chats: bool
    column: str
    values: Iterable[tuple[str, Any]]
    share: Callable[[], float | None]


class _Rows(Protocol):
    """Rows of a data set, by number."""

    @property
    def column_names(self) -> list[str]: ...
    def __len__(self) -> int: ...
    def rows(self, indices: Sequence[int]) -> Iterator[dict[str, Any] | Unusable]: ...


def load_documents(
    dataset: str,
    split: str,
    config: str | None = None,
    *,
    text_column: str | None = None,
    messages_column: str | None = None,
    shuffle_seed: int | None = None,
    streaming: bool | None = None,
    listen: Listener = lambda rows: None,
) -> Documents:
    """The documents of `dataset`, in order, or shuffled by `shuffle_seed`.

    A text file is one document. Other files and hub data sets give one document per row of the column that is
    named; when none is, of `text`, `messages` or `conversations`, or of Alpaca's columns, whichever there is.
    Shuffling permutes the numbers of the rows, or of the text files; no more of the data set is in memory
    for it. `listen` is told of rows while files are read a first time.

    streaming: read rows from the first to the last, without knowing how many there are; a shuffle is then one
    within a buffer. None: where local files are large, and neither shuffled nor sliced.

    Raises:
        RequestError: missing, unreadable, of an unknown kind, without the column, with several of them while
            none is named, without the split or the configuration, or without any row; a slice of a stream.
    """
    path = Path(dataset).expanduser()
    if (path / "config.json").is_file():
        raise RequestError(
            f"DATASET {dataset}: is a model checkpoint, not a data set; TEACHER comes first, then DATASET"
        )
    if streaming and _is_slice(split):
        raise RequestError(f"--streaming: --split {split}: a slice needs the number of rows; leave one out")
    how: dict[str, Any] = {
        "text_column": text_column,
        "messages_column": messages_column,
        "shuffle_seed": shuffle_seed,
    }
    if streaming and not path.exists() and not _is_local(dataset, path):
        return _stream_documents(HubStream(dataset, config, split), dataset, **how)
    if not path.exists() or _is_saved(path):
        return _documents(rows=_Table(load_table(dataset, split, config)), dataset=dataset, **how)
    found = find_files(path, dataset, config)
    names = split_names(split, list(found.splits), dataset)

    if found.kind == "text":
        pieces = pieces_of(split, {name: len(found.splits[name]) for name in names})
        files = [file for piece in pieces for file in found.splits[piece.split][piece.start : piece.stop]]
        return _text_documents(files=files, dataset=dataset, **how)
    every = [file for name in names for file in found.splits[name]]
    if streaming is None:
        large = sum(file.stat().st_size for file in every) >= _STREAMED_BYTES
        streaming = large and shuffle_seed is None and not _is_slice(split)
    if streaming:
        return _stream_documents(FileStream(every), dataset, **how)
    rows: _Rows
    if found.kind == "json":
        parts = {name: JsonRows(found.splits[name], listen) for name in names}
        pieces = pieces_of(split, {name: len(part) for name, part in parts.items()})
        rows = _Chain([(parts[piece.split], piece.start, piece.stop) for piece in pieces])
    else:
        rows = _Table(load_table(dataset, split, config))
    return _documents(rows=rows, dataset=dataset, **how)


def load_table(dataset: str, split: str, config: str | None = None) -> Any:
    """A data set with columns (a `datasets.Dataset`): as `load_documents` finds it.

    Raises:
        RequestError: missing, unreadable, of an unknown kind, plain text, without the split or the
            configuration, or without any row.
    """
    path = Path(dataset).expanduser()
    if path.exists():
        table = _local(path, dataset, split, config)
    elif _is_local(dataset, path):
        raise RequestError(f"DATASET {dataset}: no such file or directory")
    else:
        table = hub_table(dataset, config, split)
    if len(table) == 0:
        raise RequestError(f"DATASET {dataset}: it is empty")
    return table


def _local(path: Path, dataset: str, split: str, config: str | None) -> Any:
    if _is_saved(path):
        if config is not None:
            raise RequestError(
                f"--dataset-config {config}: {dataset} has no configurations; leave the flag out"
            )
        saved = saved_table(path, dataset)
        tables = dict(saved) if hasattr(saved, "keys") else {"train": saved}
        names = split_names(split, list(tables), dataset)
    else:
        found = find_files(path, dataset, config)
        if found.kind == "text":
            raise RequestError(f"DATASET {dataset}: plain text, without columns")
        names = split_names(split, list(found.splits), dataset)
        tables = {name: local_table(found.splits[name], found.kind, dataset) for name in names}
    return joined(tables, pieces_of(split, {name: len(tables[name]) for name in names}))


def _is_local(dataset: str, path: Path) -> bool:
    """Whether a name that does not exist here is meant as a path."""
    return dataset.startswith((".", "/", "~")) or kind_of(path) is not None


def _is_slice(split: str) -> bool:
    return "[" in split or "(" in split


def _is_saved(path: Path) -> bool:
    """Whether it is a directory that `save_to_disk` of `datasets` wrote."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _text_documents(
    files: Sequence[Path],
    dataset: str,
    text_column: str | None,
    messages_column: str | None,
    shuffle_seed: int | None,
) -> Documents:
    for flag, column in (("--text-column", text_column), ("--messages-column", messages_column)):
        if column is not None:
            raise RequestError(f"{flag} {column}: {dataset} is plain text, without columns")
    if not files:
        raise RequestError(f"DATASET {dataset}: it is empty")
    values = _TextFiles([files[i] for i in _order(len(files), shuffle_seed)])
    return Documents(False, TEXT_COLUMN, values, values.share)


class _TextFiles:
    """Documents of plain text files; read one by one, so that a folder may be larger than memory."""

    def __init__(self, files: list[Path]) -> None:
        self._files, self._read = files, 0

    def share(self) -> float:
        """Of the files, how many were read."""
        return self._read / len(self._files)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        for read, file in enumerate(self._files):
            self._read = read
            try:
                yield str(file), read_text(file)
            except DataFileError as error:
                raise RequestError(f"DATASET {file}: cannot be read: {error}") from error


def _documents(
    rows: _Rows,
    dataset: str,
    text_column: str | None,
    messages_column: str | None,
    shuffle_seed: int | None,
) -> Documents:
    if len(rows) == 0:
        raise RequestError(f"DATASET {dataset}: it is empty")
    chats, column = _choose_column(rows.column_names, dataset, text_column, messages_column)
    order = _order(len(rows), shuffle_seed)
    if chats and column == ALPACA_COLUMNS[0] and set(ALPACA_COLUMNS) <= set(rows.column_names):
        values = _Values(rows, order, _alpaca)
        return Documents(chats, column, values, values.share)
    if not chats:
        _check_texts(rows, column, dataset)
    pick = _picker(column, chats)
    if isinstance(rows, _Table):
        rows = rows.only(column)
    values = _Values(rows, order, pick)
    return Documents(chats, column, values, values.share)


def _stream_documents(
    stream: RowStream,
    dataset: str,
    text_column: str | None,
    messages_column: str | None,
    shuffle_seed: int | None,
) -> Documents:
    types = head_of(stream)
    if not types:
        raise RequestError(f"DATASET {dataset}: it is empty")
    chats, column = _choose_column(list(types), dataset, text_column, messages_column)
    columns, pick = [column], _picker(column, chats)
    if chats and column == ALPACA_COLUMNS[0] and set(ALPACA_COLUMNS) <= set(types):
        columns, pick = list(types), _alpaca
    elif not chats and (holds := _no_text(types[column])):
        raise RequestError(f"--text-column {column}: {dataset} holds {holds} there, not text")
    values = StreamValues(stream, columns, pick, shuffle_seed)
    return Documents(chats, column, values, stream.share)


def _order(count: int, shuffle_seed: int | None) -> Sequence[int]:
    """0 to count - 1, permuted when there is a seed."""
    if shuffle_seed is None:
        return range(count)
    order: list[int] = np.random.default_rng(shuffle_seed).permutation(count).tolist()
    return order


def _choose_column(
    columns: Sequence[str], dataset: str, text_column: str | None, messages_column: str | None
) -> tuple[bool, str]:
    """Whether the documents are chats, and the column that holds them (of Alpaca's the first)."""
    if text_column is not None and messages_column is not None:
        raise RequestError("--text-column, --messages-column: give one of the two, not both")
    named = text_column if messages_column is None else messages_column
    if named is not None:
        flag = "--text-column" if messages_column is None else "--messages-column"
        if named not in columns:
            raise RequestError(f"{flag} {named}: the columns of {dataset} are {', '.join(columns)}")
        return messages_column is not None, named
    found = [name for name in (TEXT_COLUMN, MESSAGES_COLUMN, CONVERSATIONS_COLUMN) if name in columns]
    if len(found) > 1:
        flags = [f"--{'text' if name == TEXT_COLUMN else 'messages'}-column {name}" for name in found]
        raise RequestError(
            f"DATASET {dataset}: has both a {' and a '.join(found)} column; say {' or '.join(flags)}"
        )
    if not found and set(ALPACA_COLUMNS) <= set(columns):
        return True, ALPACA_COLUMNS[0]
    if not found:
        raise RequestError(
            f"--text-column {TEXT_COLUMN}: the columns of {dataset} are {', '.join(columns)}; name the one "
            "that holds the text, or with --messages-column the one that holds chats"
        )
    return found[0] != TEXT_COLUMN, found[0]


def _check_texts(rows: _Rows, column: str, dataset: str) -> None:
    """RequestError where a column can hold no text at all."""
    holds = rows.holds(column) if isinstance(rows, _Table | _Chain) else None
    if holds is not None:
        raise RequestError(f"--text-column {column}: {dataset} holds {holds} there, not text")


def _no_text(types: set[type]) -> str | None:
    """The names of types among which there is no text."""
    return None if not types or str in types else ", ".join(sorted(kind.__name__ for kind in types))


def _picker(column: str, chats: bool) -> Callable[[dict[str, Any]], Any]:
    def chat(row: dict[str, Any]) -> Any:
        return row.get(column)

    def text(row: dict[str, Any]) -> Any:
        value = row.get(column)
        if value is None or isinstance(value, str):
            # A row without a text is an empty one, and counted as that.
            return value or ""
        return Unusable(f"--text-column {column}: holds {type(value).__name__}, not text")

    return chat if chats else text


def _alpaca(row: dict[str, Any]) -> Any:
    try:
        return alpaca_messages(row)
    except (TypeError, ValueError):
        return Unusable("its history is no list of pairs, question and answer")


class _Values:
    """What `pick` makes of the rows, in an order given by row numbers; a few rows are in memory at a time."""

    def __init__(self, rows: _Rows, order: Sequence[int], pick: Callable[[dict[str, Any]], Any]) -> None:
        self._rows, self._order, self._pick = rows, order, pick
        self._read = 0

    def share(self) -> float:
        """Of the rows, how many were read."""
        return self._read / len(self._order)

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        for start in range(0, len(self._order), _BATCH_ROWS):
            numbers = self._order[start : start + _BATCH_ROWS]
            for place, (number, row) in enumerate(zip(numbers, self._rows.rows(numbers), strict=True)):
                self._read = start + place
                yield f"row {number}", row if isinstance(row, Unusable) else self._pick(row)


class _Table:
    """The rows of a `datasets.Dataset`."""

    def __init__(self, table: Any) -> None:
        self._table = table
        self.column_names: list[str] = list(table.column_names)

    def __len__(self) -> int:
        return len(self._table)

    def only(self, column: str) -> _Table:
        """Without the other columns, which are then not read."""
        return _Table(self._table.select_columns([column]))

    def holds(self, column: str) -> str | None:
        """The type of a column that holds no text."""
        dtype = str(getattr(self._table.features[column], "dtype", "lists or objects"))
        return None if dtype in ("string", "large_string", "string_view", "null") else dtype

    def rows(self, indices: Sequence[int]) -> Iterator[dict[str, Any] | Unusable]:
        """The rows with these numbers."""
        batch = self._table[indices]
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


class _Chain:
    """Rows [start, stop) of several JSON files' rows, one after the other."""

    def __init__(self, parts: Sequence[tuple[JsonRows, int, int]]) -> None:
        self._parts = parts
        self._ends = np.cumsum([stop - start for _, start, stop in parts]).tolist()
        self.column_names = list(dict.fromkeys(name for rows, _, _ in parts for name in rows.column_names))

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._ends else 0

    def holds(self, column: str) -> str | None:
        """The type of the values of a column that holds no text."""
        return _no_text({kind for rows, _, _ in self._parts for kind in rows.types.get(column, ())})

    def rows(self, indices: Sequence[int]) -> Iterator[dict[str, Any] | Unusable]:
        """The rows with these numbers."""
        for number, group in groupby(indices, lambda index: bisect_right(self._ends, index)):
            rows, start, stop = self._parts[number]
            first = self._ends[number] - (stop - start)
            yield from rows.rows([index - first + start for index in group])
