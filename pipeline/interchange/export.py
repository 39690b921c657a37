"""`distily-cache export`: a store as Parquet files or as a saved data set, whole or not at all."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from featurestore.format.schema import GroupSpec
from featurestore.maintenance.export import Progress, description, find_groups, write_arrow, write_parquet
from featurestore.reader import CacheReader
from featurestore.storage.files import TEMPORARY, sync, writing
from pipeline.errors import RequestError

FORMATS = ("parquet", "datasets")


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What one export wrote. tokens: positions; bytes: of all files."""

    samples: int
    tokens: int
    groups: list[str]
    files: list[str]
    bytes: int
    manifest: str

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self)


def export_store(
    store: str | Path,
    out: Path,
    format_name: str,
    kinds: Sequence[str] | None,
    progress: Progress | None = None,
) -> Exported:
    """Write the samples of `store` to the new directory `out`.

    Raises RequestError for a format that there is not or an `out` that is in use, MissingFeatureError for a
    kind that not every sample has.
    """
    if format_name not in FORMATS:
        raise RequestError(f"--format {format_name}: choose one of {', '.join(FORMATS)}")
    out = out.expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RequestError(f"OUT {out}: exists and is not empty; choose another directory")
    reader = CacheReader.open(store)
    groups = find_groups(reader, kinds)
    with writing("an export", out.parent), _appearing(out) as folder:
        if format_name == "parquet":
            write_parquet(reader, groups, folder, progress)
        else:
            _save_dataset(reader, groups, folder, progress)
    written = sorted(file for file in out.rglob("*") if file.is_file())
    return Exported(
        samples=len(reader),
        tokens=int(reader.lengths.sum()),
        groups=[spec.kind for spec in groups],
        files=[str(file.relative_to(out)) for file in written],
        bytes=sum(file.stat().st_size for file in written),
        manifest=reader.manifest_digest,
    )


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A directory beside `out` that takes its name when the body has succeeded, and goes when it has not."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.parent / f"{TEMPORARY}{out.name}-{secrets.token_hex(4)}"
    folder.mkdir()
    try:
        yield folder
        # Replaces an empty directory only.
        folder.rename(out)
        sync(out.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _save_dataset(
    reader: CacheReader, groups: Sequence[GroupSpec], folder: Path, progress: Progress | None
) -> None:
    """What `datasets.load_from_disk` opens. The shards are mapped, never loaded whole."""
    try:
        import datasets
    except ImportError as error:
        raise RequestError("--format datasets: not installed; install the extra [generate]") from error
    datasets.disable_progress_bars()
    with _scratch(folder.with_name(f"{folder.name}-arrow")) as scratch:
        shards = write_arrow(reader, groups, scratch, progress)
        parts = [datasets.Dataset.from_file(str(shard)) for shard in shards]
        whole = datasets.concatenate_datasets(parts)
        whole.info.description = json.dumps(description(reader, groups))
        whole.save_to_disk(str(folder), num_shards=len(shards))


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
