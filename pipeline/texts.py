"""Data sets as documents: local files and folders, saved `datasets`, and names on the hub."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import RequestError, one_line

_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}
_TEXT = (".txt", ".md", ".rst")
TEXT_COLUMN, MESSAGES_COLUMN = "text", "messages"
_BATCH_ROWS = 256


@dataclass(frozen=True)
class Documents:
    """What a data set holds, in the order in which it is read.

    chats: the values are conversations, unchecked, as they lie in the column; else they are texts.
    values: pairs of where a value is, for an error ("row 3"; rows count from 0), and the value.
    """

    chats: bool
    values: Iterable[tuple[str, Any]]


def load_documents(
    dataset: str,
    split: str,
    config: str | None = None,
    *,
    text_column: str | None = None,
    messages_column: str | None = None,
    shuffle_seed: int | None = None,
) -> Documents:
    """The documents of `dataset`, in order, or shuffled by `shuffle_seed`.

    A text file is one document. Other files and hub data sets give one document per row of the column that is
    named; when none is, of `text` or `messages`, whichever there is. Shuffling permutes the numbers of the
    rows, or of the text files; no more of the data set is in memory for it.

    Raises:
        RequestError: missing, unreadable, of an unknown kind, without the column, with both columns while
            none is named, or without any row.
    """
    path = Path(dataset).expanduser()
    files = _files(path) if path.exists() else []
    if files and all(file.suffix.lower() in _TEXT for file in files):
        if messages_column is not None:
            raise RequestError(
                f"--messages-column {messages_column}: {dataset} is plain text, without columns"
            )
        return Documents(False, _TextFiles([files[i] for i in _order(len(files), shuffle_seed)]))
    table = _load(dataset, split, config, files)
    chats, column = _choose_column(table.column_names, dataset, text_column, messages_column)
    rows = _Column(table, column, _order(len(table), shuffle_seed))
    return Documents(chats, rows if chats else _Texts(rows, column, dataset))


def load_table(dataset: str, split: str, config: str | None = None) -> Any:
    """A data set with columns (a `datasets.Dataset`): as `load_documents` finds it, text files left aside.

    Raises:
        RequestError: missing, unreadable, of an unknown kind or without any row.
    """
    path = Path(dataset).expanduser()
    files = [file for file in _files(path) if file.suffix.lower() not in _TEXT] if path.exists() else []
    return _load(dataset, split, config, files)


def _load(dataset: str, split: str, config: str | None, files: list[Path]) -> Any:
    path = Path(dataset).expanduser()
    if path.exists():
        table = _load_local(path, files, dataset)
    elif dataset.startswith((".", "/", "~")) or path.suffix.lower() in (*_BUILDERS, *_TEXT):
        raise RequestError(f"DATASET {dataset}: no such file or directory")
    else:
        table = _load_hub(dataset, split, config)
    if hasattr(table, "keys"):  # a DatasetDict
        if split not in table:
            raise RequestError(f"--split {split}: {dataset} has {', '.join(sorted(table))}")
        table = table[split]
    if len(table) == 0:
        raise RequestError(f"DATASET {dataset}: it is empty")
    return table


class _TextFiles:
    """Documents of plain text files; read one by one, so that a folder may be larger than memory."""

    def __init__(self, files: list[Path]) -> None:
        self._files = files

    def __iter__(self) -> Iterator[tuple[str, str]]:
        for file in self._files:
            try:
                # utf-8-sig: a byte order mark is no part of the text.
                yield str(file), file.read_text(encoding="utf-8-sig")
            except UnicodeDecodeError as error:
                raise RequestError(
                    f"DATASET {file}: not UTF-8 text (byte {error.start}); convert it first"
                ) from error
            except OSError as error:
                raise RequestError(f"DATASET {file}: cannot be read: {error.strerror}") from error


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    known = (*_BUILDERS, *_TEXT)
    return sorted(
        f for f in path.rglob("*") if f.is_file() and f.suffix.lower() in known and f.name[0] != "."
    )


def _load_local(path: Path, files: list[Path], dataset: str) -> Any:
    import datasets

    if path.is_dir() and ((path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()):
        return _guard(dataset, lambda: datasets.load_from_disk(str(path)))
    builders = {_BUILDERS.get(file.suffix.lower(), file.suffix or "no suffix") for file in files}
    if len(builders) != 1 or not builders <= set(_BUILDERS.values()):
        found = ", ".join(sorted(builders)) or "no file of a known kind"
        raise RequestError(
            f"DATASET {dataset}: found {found}; give files of one kind: .txt, .jsonl, .parquet or .arrow"
        )
    names = [str(file) for file in files]
    return _guard(dataset, lambda: datasets.load_dataset(builders.pop(), data_files=names, split="train"))


def _load_hub(dataset: str, split: str, config: str | None) -> Any:
    import datasets

    return _guard(dataset, lambda: datasets.load_dataset(dataset, config, split=split))


def _guard(dataset: str, load: Any) -> Any:
    import datasets

    # The cause is in our own message; the library would log it a second time.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        return load()
    except Exception as error:  # builders raise ValueError, OSError, ArrowInvalid, DatasetGenerationError, …
        cause = one_line(error.__cause__ or error)
        raise RequestError(f"DATASET {dataset}: cannot be loaded: {cause}") from error


def _order(count: int, shuffle_seed: int | None) -> Sequence[int]:
    """0 to count - 1, permuted when there is a seed."""
    if shuffle_seed is None:
        return range(count)
    order: list[int] = np.random.default_rng(shuffle_seed).permutation(count).tolist()
    return order


def _choose_column(
    columns: Sequence[str], dataset: str, text_column: str | None, messages_column: str | None
) -> tuple[bool, str]:
    """Whether the documents are chats, and the column that holds them."""
    if text_column is not None and messages_column is not None:
        raise RequestError("--text-column, --messages-column: give one of the two, not both")
    named = text_column if messages_column is None else messages_column
    if named is not None:
        flag = "--text-column" if messages_column is None else "--messages-column"
        if named not in columns:
            raise RequestError(f"{flag} {named}: the columns of {dataset} are {', '.join(columns)}")
        return messages_column is not None, named
    found = [name for name in (TEXT_COLUMN, MESSAGES_COLUMN) if name in columns]
    if len(found) == 2:
        raise RequestError(
            f"DATASET {dataset}: has both a {TEXT_COLUMN} and a {MESSAGES_COLUMN} column; "
            f"say --text-column {TEXT_COLUMN} or --messages-column {MESSAGES_COLUMN}"
        )
    if not found:
        raise RequestError(
            f"--text-column {TEXT_COLUMN}: the columns of {dataset} are {', '.join(columns)}; name the one "
            "that holds the text, or with --messages-column the one that holds chats"
        )
    return found[0] == MESSAGES_COLUMN, found[0]


class _Column:
    """The values of one column, in an order given by row numbers; a few rows are in memory at a time."""

    def __init__(self, table: Any, name: str, order: Sequence[int]) -> None:
        self._table, self._name, self._order = table.select_columns([name]), name, order

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        for start in range(0, len(self._order), _BATCH_ROWS):
            rows = self._order[start : start + _BATCH_ROWS]
            for row, value in zip(rows, self._table[rows][self._name], strict=True):
                yield f"row {row}", value


class _Texts:
    """A column of texts; rows without one are passed over."""

    def __init__(self, rows: _Column, name: str, dataset: str) -> None:
        self._rows, self._name, self._dataset = rows, name, dataset

    def __iter__(self) -> Iterator[tuple[str, str]]:
        for where, text in self._rows:
            if text is None:
                continue
            if not isinstance(text, str):
                raise RequestError(
                    f"--text-column {self._name}: {self._dataset} holds {type(text).__name__} there, not text"
                )
            yield where, text
