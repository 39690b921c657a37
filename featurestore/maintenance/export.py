"""Samples of a store as Arrow rows, one row per sample, and as sharded Parquet or Arrow files.

Memory is bounded by a row group: samples are read, converted and written a few at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from featurestore.format.kinds.arrow import IDS, lists
from featurestore.format.kinds.table import kind_of
from featurestore.format.schema import GroupSpec
from featurestore.identity import canonical_json
from featurestore.reader import CachedSample, CacheReader
from featurestore.storage.files import sync_tree

Progress = Callable[[int, int], None]

METADATA_KEY = "distily-cache"
# Uncompressed, by the upper bound that the specs give.
SHARD_BYTES = 512 * 2**20
ROW_GROUP_BYTES = 32 * 2**20


def find_groups(reader: CacheReader, kinds: Sequence[str] | None) -> list[GroupSpec]:
    """The widest spec of each kind ("logits", "hidden.L2"); without `kinds`, of all that every sample has.

    Raises MissingFeatureError for a kind that is not there, or not of every sample.
    """
    if kinds is None:
        complete = {spec.kind for spec in reader.complete_groups()}
        kinds = sorted(complete, key=lambda kind: (kind != "logits", len(kind), kind))
    return [reader.find(kind) for kind in dict.fromkeys(kinds)]


def export_schema(reader: CacheReader, groups: Sequence[GroupSpec]) -> Any:
    """The columns of an export. The metadata `distily-cache` is JSON: teacher, manifest and groups."""
    fields = [("id", pa.string()), ("tokens", IDS), ("loss_mask", pa.list_(pa.bool_()))]
    if reader.knows_documents():
        fields.append(("documents", pa.list_(pa.string())))
    for spec in groups:
        fields += kind_of(spec).export_fields(spec)
    return pa.schema(fields, metadata={METADATA_KEY: canonical_json(description(reader, groups))})


def description(reader: CacheReader, groups: Sequence[GroupSpec]) -> dict[str, Any]:
    """Where an export's numbers come from, as a JSON object."""
    return {
        "teacher": reader.identity.to_json(),
        "manifest": reader.manifest_digest,
        "groups": [spec.to_json() for spec in groups],
    }


def to_batch(samples: Sequence[CachedSample], groups: Sequence[GroupSpec], schema: Any) -> Any:
    """A record batch of these samples, one row each; no step is a loop over positions."""
    lengths = [len(sample.tokens) for sample in samples]
    columns = {
        "id": pa.array([sample.id for sample in samples]),
        "tokens": lists(lengths, pa.array(np.concatenate([sample.tokens for sample in samples]))),
        "loss_mask": lists(lengths, pa.array(np.concatenate([sample.loss_mask for sample in samples]))),
    }
    if "documents" in schema.names:
        columns["documents"] = pa.array([list(sample.documents) for sample in samples], pa.list_(pa.string()))
    for spec in groups:
        rows = kind_of(spec).export_columns(spec, [sample.features[spec] for sample in samples], lengths)
        columns |= {name: lists(lengths, values) for name, values in rows.items()}
    return pa.record_batch([columns[name] for name in schema.names], schema=schema)


def write_parquet(
    reader: CacheReader, groups: Sequence[GroupSpec], folder: Path, progress: Progress | None = None
) -> list[Path]:
    """Write train-00000-of-0000N.parquet, … into `folder`, as the hub lays them out; durable at the end."""

    def start(path: str, schema: Any) -> Any:
        return pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True)

    return _write(
        reader=reader, groups=groups, folder=folder, suffix="parquet", start=start, progress=progress
    )


def write_arrow(
    reader: CacheReader, groups: Sequence[GroupSpec], folder: Path, progress: Progress | None = None
) -> list[Path]:
    """The same rows as Arrow IPC streams, which can be mapped into memory."""
    return _write(
        reader=reader,
        groups=groups,
        folder=folder,
        suffix="arrow",
        start=pa.ipc.new_stream,
        progress=progress,
    )


def _write(
    reader: CacheReader,
    groups: Sequence[GroupSpec],
    folder: Path,
    suffix: str,
    start: Callable[[str, Any], Any],
    progress: Progress | None,
) -> list[Path]:
    schema, hidden = export_schema(reader, groups), reader.identity.hidden_size
    cost = 8 + sum(kind_of(spec).export_row_bytes(spec, hidden) for spec in groups)
    shards = list(_runs(0, reader.lengths, SHARD_BYTES // cost))
    total, done = reader.lengths.sum(), 0
    paths = []
    for number, shard in enumerate(shards):
        paths.append(folder / f"train-{number:05d}-of-{len(shards):05d}.{suffix}")
        with start(str(paths[-1]), schema) as writer:
            lengths = reader.lengths[shard.start : shard.stop].tolist()
            for indices in _runs(shard.start, lengths, ROW_GROUP_BYTES // cost):
                samples = [reader.read(index, groups) for index in indices]
                writer.write_batch(to_batch(samples, groups, schema))
                done += sum(len(sample.tokens) for sample in samples)
                if progress is not None:
                    progress(done, total)
    sync_tree(folder)
    return paths


def _runs(first: int, lengths: Iterable[int], most: int) -> Iterator[range]:
    """Consecutive samples, from index `first` on, of at most `most` positions together; a longer one is
    alone.
    """
    start, end, positions = first, first, 0
    for length in lengths:
        if end > start and positions + length > most:
            yield range(start, end)
            start, positions = end, 0
        end += 1
        positions += length
    if end > start:
        yield range(start, end)
