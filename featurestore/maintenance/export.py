"""Samples of a store as Arrow rows, one row per sample, and as sharded Parquet or Arrow files.

Memory is bounded by a row group: samples are read, converted and written a few at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from featurestore.format.codec import row_starts
from featurestore.format.schema import (
    NO_DRAW,
    GroupSpec,
    HiddenFeatures,
    HiddenSpec,
    LogitsFeatures,
    LogitsSpec,
    LseFeatures,
    LseSpec,
)
from featurestore.identity import canonical_json
from featurestore.reader import CachedSample, CacheReader
from featurestore.storage.files import sync_tree

Array = npt.NDArray[Any]
Progress = Callable[[int, int], None]

METADATA_KEY = "distily-cache"
# Uncompressed, by the upper bound that the specs give.
SHARD_BYTES = 512 * 2**20
ROW_GROUP_BYTES = 32 * 2**20

IDS, NUMBERS = pa.list_(pa.int32()), pa.list_(pa.float32())


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
    if any(keys for copies in reader.documents() for keys in copies):
        fields.append(("documents", pa.list_(pa.string())))
    for spec in groups:
        if isinstance(spec, HiddenSpec):
            fields.append((_column(spec), pa.list_(NUMBERS)))
            continue
        if isinstance(spec, LseSpec):
            fields.append((_column(spec), NUMBERS))
            continue
        fields += [("head_ids", pa.list_(IDS)), ("head_logprobs", pa.list_(NUMBERS))]
        fields += [("lse", NUMBERS), ("label_logprob", NUMBERS), ("entropy", NUMBERS)]
        fields += [("tail_ids", pa.list_(IDS))] if spec.tail else []
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
        "tokens": _lists(lengths, pa.array(np.concatenate([sample.tokens for sample in samples]))),
        "loss_mask": _lists(lengths, pa.array(np.concatenate([sample.loss_mask for sample in samples]))),
    }
    if "documents" in schema.names:
        columns["documents"] = pa.array([list(sample.documents) for sample in samples], pa.list_(pa.string()))
    for spec in groups:
        features = [sample.features[spec] for sample in samples]
        if isinstance(spec, LogitsSpec):
            rows = _logits_columns([f for f in features if isinstance(f, LogitsFeatures)])
        elif isinstance(spec, LseSpec):
            rows = {
                _column(spec): pa.array(
                    np.concatenate([f.lse for f in features if isinstance(f, LseFeatures)])
                )
            }
        else:
            rows = {_column(spec): _hidden_rows([f for f in features if isinstance(f, HiddenFeatures)])}
        columns |= {name: _lists(lengths, values) for name, values in rows.items()}
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
    schema = export_schema(reader, groups)
    cost = 8 + sum(_bytes_per_row(spec, reader.identity.hidden_size) for spec in groups)
    lengths = reader.lengths.tolist()
    shards = list(_runs(range(len(reader)), lengths, SHARD_BYTES // cost))
    total, done = sum(lengths), 0
    paths = []
    for number, shard in enumerate(shards):
        paths.append(folder / f"train-{number:05d}-of-{len(shards):05d}.{suffix}")
        with start(str(paths[-1]), schema) as writer:
            for indices in _runs(shard, lengths, ROW_GROUP_BYTES // cost):
                samples = [reader.read(index, groups) for index in indices]
                writer.write_batch(to_batch(samples, groups, schema))
                done += sum(lengths[index] for index in indices)
                if progress is not None:
                    progress(done, total)
    sync_tree(folder)
    return paths


def _runs(indices: Sequence[int], lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Consecutive indices of samples of at most `most` positions together; a longer sample is alone."""
    run: list[int] = []
    positions = 0
    for index in indices:
        if run and positions + lengths[index] > most:
            yield run
            run, positions = [], 0
        run.append(index)
        positions += lengths[index]
    if run:
        yield run


def _bytes_per_row(spec: GroupSpec, hidden_size: int) -> int:
    """Of one position, uncompressed, at most."""
    if isinstance(spec, LogitsSpec):
        return 8 * spec.top_k + 4 * spec.tail + 24
    return 4 * hidden_size if isinstance(spec, HiddenSpec) else 4


def _column(spec: HiddenSpec | LseSpec) -> str:
    """hidden_L2, lse_T0.5."""
    return spec.kind.replace(".", "_", 1)


def _logits_columns(features: Sequence[LogitsFeatures]) -> dict[str, Any]:
    """Of all positions of all samples, one after the other: heads as lists, numbers of a row flat."""
    counts, ids, logits, lse, label, entropy = (
        np.concatenate([getattr(f, name) for f in features])
        for name in ("counts", "ids", "logits", "lse", "label_logprob", "entropy")
    )
    logprobs = logits - np.repeat(lse, counts)
    columns = {
        "head_ids": _lists(counts, pa.array(ids.astype(np.int32))),
        "head_logprobs": _lists(counts, pa.array(logprobs)),
        "lse": pa.array(lse),
        "label_logprob": pa.array(label, from_pandas=True),
        "entropy": pa.array(entropy, from_pandas=True),
    }
    tails = [f.tail_ids for f in features if f.tail_ids is not None]
    if tails:
        draws = np.concatenate(tails)
        drawn = draws != NO_DRAW
        columns["tail_ids"] = _lists(drawn.sum(axis=1), pa.array(draws[drawn]))
    return columns


def _hidden_rows(features: Sequence[HiddenFeatures]) -> Any:
    values = np.concatenate([f.to_float32() for f in features])
    return _lists(np.full(len(values), values.shape[1]), pa.array(values.ravel()))


def _lists(counts: Sequence[int] | Array, values: Any) -> Any:
    """Cut an array into lists of these lengths."""
    return pa.ListArray.from_arrays(pa.array(row_starts(np.asarray(counts)), pa.int32()), values)
