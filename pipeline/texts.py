"""Data sets as documents: local files and folders, saved `datasets`, and names on the hub."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import RequestError

_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}
_TEXT = (".txt", ".md", ".rst")


def load_documents(dataset: str, split: str, text_column: str, config: str | None = None) -> Iterable[str]:
    """The documents of `dataset`, in order.

    A text file is one document. Other files and hub data sets give one document per row of `text_column`.

    Raises:
        RequestError: missing, unreadable, of an unknown kind, without the column or without any row.
    """
    path = Path(dataset).expanduser()
    files = _files(path) if path.exists() else []
    if files and all(file.suffix.lower() in _TEXT for file in files):
        return _TextFiles(files)
    return _column(_load(dataset, split, config, files), dataset, text_column)


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

    def __iter__(self) -> Iterator[str]:
        for file in self._files:
            try:
                yield file.read_text(encoding="utf-8")
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
        cause = " ".join(str(error.__cause__ or error).split())[:200]
        raise RequestError(f"DATASET {dataset}: cannot be loaded: {cause}") from error


def _column(table: Any, dataset: str, text_column: str) -> Iterable[str]:
    if text_column not in table.column_names:
        raise RequestError(
            f"--text-column {text_column}: the columns of {dataset} are {', '.join(table.column_names)}"
        )
    return _Column(table, text_column, dataset)


class _Column:
    def __init__(self, table: Any, name: str, dataset: str) -> None:
        self._table, self._name, self._dataset = table.select_columns([name]), name, dataset

    def __iter__(self) -> Iterator[str]:
        for row in self._table:
            text = row[self._name]
            if text is None:
                continue
            if not isinstance(text, str):
                raise RequestError(
                    f"--text-column {self._name}: {self._dataset} holds {type(text).__name__} there, not text"
                )
            yield text
