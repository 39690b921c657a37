"""Data sets with typed columns, as `datasets` makes them: of files, of a saved directory, of the hub."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from distily.datafiles import csv_columns, digest_of, is_packed, open_unpacked, unpack
from distily.errors import DataFileError
from distily.safety.parquet import check_parquet
from distily.text import one_line
from pipeline.data.data_folder import Piece
from pipeline.errors import RequestError


def local_table(files: Sequence[Path], kind: str, dataset: str) -> Any:
    """A `datasets.Dataset` of files of one kind, converted once for the same content and the same paths.

    The library takes paths for patterns and looks at the time of a file to see whether it has changed. So it
    is given what it would make of them: the paths as they are, and the hash of each content.

    Raises:
        RequestError: a file that cannot be read.
    """
    return _guard(dataset, lambda: _local_table(files, kind))


def saved_table(path: Path, dataset: str) -> Any:
    """What `save_to_disk` wrote: a `datasets.Dataset` or a `datasets.DatasetDict`."""
    import datasets

    return _guard(dataset, lambda: datasets.load_from_disk(str(path)))


def hub_table(dataset: str, config: str | None, split: str) -> Any:
    """A split of a data set on the hub."""
    import datasets

    return _guard(dataset, lambda: datasets.load_dataset(dataset, config, split=split))


def joined(tables: Mapping[str, Any], pieces: Sequence[Piece]) -> Any:
    """The rows of `pieces`, of several tables, as one."""
    import datasets

    if not pieces:
        return next(iter(tables.values())).select(range(0))
    parts = [tables[piece.split].select(range(piece.start, piece.stop)) for piece in pieces]
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def _local_table(files: Sequence[Path], kind: str) -> Any:
    import datasets
    from datasets.data_files import DataFilesDict, DataFilesList
    from datasets.packaged_modules.arrow.arrow import Arrow
    from datasets.packaged_modules.csv.csv import Csv
    from datasets.packaged_modules.json.json import Json
    from datasets.packaged_modules.parquet.parquet import Parquet

    builders = {"json": Json, "parquet": Parquet, "arrow": Arrow, "csv": Csv, "tsv": Csv}
    digests = [digest_of(file) for file in files]
    # A name with "::" would be a chain of URLs; that and what is unpacked lie under the name of the content.
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "distily-cache"
    moved = {
        file: folder / f"{digest}.{kind}"
        for file, digest in zip(files, digests, strict=True)
        if is_packed(file) or "::" in str(file.resolve())
    }
    paths = [str(moved.get(file) or file.resolve()) for file in files]
    options = _text_columns(files[0], "," if kind == "csv" else "\t") if kind in ("csv", "tsv") else {}
    builder = builders[kind](
        data_files=DataFilesDict({"train": DataFilesList(paths, [(digest,) for digest in digests])}),
        dataset_name=kind,
        **options,
    )
    made: list[Path] = []
    try:
        if not Path(builder.cache_dir).exists():
            for file, place in moved.items():
                made.append(place)
                _place(file, place)
            for path in paths if kind == "parquet" else ():
                with Path(path).open("rb") as opened:
                    check_parquet(opened)
        builder.download_and_prepare()
    finally:
        for place in made:
            place.unlink(missing_ok=True)
    return builder.as_dataset(split="train")


def _text_columns(file: Path, delimiter: str) -> dict[str, Any]:
    """All columns of a table of text are text: pandas would read 007 as 7, and NA as nothing."""
    import datasets

    with open_unpacked(file) as content:
        names = csv_columns(content, delimiter)
    features = datasets.Features({name: datasets.Value("string") for name in names})
    return {"sep": delimiter, "features": features, "keep_default_na": False}


def _place(file: Path, place: Path) -> None:
    """Put the content of `file` at `place`, whole or not at all."""
    place.parent.mkdir(parents=True, exist_ok=True)
    beside = place.with_name(f"{place.name}.{os.getpid()}")
    try:
        if is_packed(file):
            with beside.open("wb") as target:
                unpack(file, target)
        else:
            beside.symlink_to(file.resolve())
        beside.replace(place)
    finally:
        beside.unlink(missing_ok=True)


def _guard(dataset: str, load: Callable[[], Any]) -> Any:
    import datasets

    # The cause is in our own message; the library would log it a second time.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        return load()
    except DataFileError as error:
        raise RequestError(f"DATASET {dataset}: cannot be loaded: {error}") from error
    except Exception as error:  # builders raise ValueError, OSError, ArrowInvalid, DatasetGenerationError, …
        cause = one_line(error.__cause__ or error)
        raise RequestError(f"DATASET {dataset}: cannot be loaded: {cause}") from error
