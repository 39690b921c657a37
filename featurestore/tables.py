"""The Parquet files: plans (task -> samples and lengths) and the samples of a bundle. Page checksums on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from featurestore.errors import CorruptionError, FeatureStoreError
from featurestore.identity import digest
from featurestore.plan import Task
from featurestore.root import Root
from featurestore.schema import Sample

PLAN_SCHEMA = pa.schema([("task", pa.string()), ("sample", pa.string()), ("length", pa.int32())])
SAMPLE_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("length", pa.int32()),
        ("tokens", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.bool_())),
    ]
)
MAX_PLAN_BYTES = 4 * 2**30


def plan_name(data: bytes) -> str:
    """plan-<32 hex>.parquet, by the bytes of the file: every bit of it is covered."""
    return f"plan-{digest(data)}.parquet"


def plan_to_bytes(tasks: Sequence[Task]) -> bytes:
    """One row per sample, tasks one after the other."""
    columns = [
        [task.id for task in tasks for _ in task.sample_ids],
        [sample_id for task in tasks for sample_id in task.sample_ids],
        [length for task in tasks for length in task.lengths],
    ]
    return _to_bytes(pa.table(columns, schema=PLAN_SCHEMA))


def read_plan(root: Root, name: str) -> list[Task]:
    """The tasks of a plan file, checked against the file's name and their own ids."""

    def parse(data: bytes, where: str) -> list[Task]:
        if plan_name(data) != name:
            raise CorruptionError(f"{where}: its content does not hash to its name; the file is damaged")
        return plan_from_bytes(data, where)

    return root.load(name, parse, MAX_PLAN_BYTES)


def plan_from_bytes(data: bytes, where: str) -> list[Task]:
    """The inverse of `plan_to_bytes`; CorruptionError for tasks that do not hash to their ids."""
    # Sample ids are random hex digits: a real plan never expands a hundredfold.
    table = _from_bytes(data, PLAN_SCHEMA, 100 * len(data) + 2**20, where)
    rows: dict[str, tuple[list[str], list[int]]] = {}
    columns = (table.column(name).to_pylist() for name in PLAN_SCHEMA.names)
    for task_id, sample_id, length in zip(*columns, strict=True):
        ids, lengths = rows.setdefault(task_id, ([], []))
        ids.append(sample_id)
        lengths.append(length)
    try:
        tasks = [Task(tuple(ids), tuple(lengths)) for ids, lengths in rows.values()]
    except FeatureStoreError as error:
        raise CorruptionError(f"{where}: {error}") from None
    if [task.id for task in tasks] != list(rows):
        raise CorruptionError(f"{where}: samples that do not hash to their task's id")
    return tasks


def samples_to_bytes(samples: Sequence[Sample]) -> bytes:
    """The content of samples.parquet: one row per sample, in the order of the task."""
    offsets = np.zeros(len(samples) + 1, dtype=np.int32)
    np.cumsum([len(sample) for sample in samples], out=offsets[1:])
    tokens = np.concatenate([sample.tokens for sample in samples])
    mask = np.concatenate([sample.loss_mask for sample in samples])
    columns = [
        pa.array([sample.id for sample in samples]),
        pa.array([len(sample) for sample in samples], pa.int32()),
        pa.ListArray.from_arrays(offsets, pa.array(tokens)),
        pa.ListArray.from_arrays(offsets, pa.array(mask)),
    ]
    return _to_bytes(pa.table(columns, schema=SAMPLE_SCHEMA))


def samples_from_bytes(data: bytes, task: Task, where: str) -> list[Sample]:
    """The samples of a task, in order; CorruptionError unless they are exactly the task's."""
    table = _from_bytes(data, SAMPLE_SCHEMA, 16 * task.rows + 256 * len(task.lengths) + 2**16, where)
    tokens = _flat(table, "tokens", np.int32)
    mask = _flat(table, "loss_mask", np.bool_)
    if table.column("length").to_pylist() != list(task.lengths) or len(tokens) != task.rows:
        raise CorruptionError(f"{where}: other sample lengths than the plan's")
    if len(mask) != task.rows:
        raise CorruptionError(f"{where}: a loss mask of another length than the tokens")
    cuts = np.cumsum(task.lengths)[:-1]
    try:
        pairs = zip(np.split(tokens, cuts), np.split(mask, cuts), strict=True)
        samples = [Sample(tokens=t, loss_mask=m) for t, m in pairs]
    except ValueError as error:
        raise CorruptionError(f"{where}: {error}") from None
    if [sample.id for sample in samples] != list(task.sample_ids):
        raise CorruptionError(f"{where}: tokens that do not hash to the plan's sample ids")
    return samples


def _flat(table: Any, name: str, dtype: type) -> Any:
    values = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in table.column(name).chunks]
    joined = np.concatenate([np.zeros(0, dtype), *values])
    return joined.astype(dtype, copy=False) if joined.dtype.kind in "ib" else np.zeros(0, dtype)


def _to_bytes(table: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return bytes(sink.getvalue())


def _from_bytes(data: bytes, schema: Any, limit: int, where: str) -> Any:
    """Read a Parquet file whose pages, by its own footer, unpack to at most `limit` bytes."""
    try:
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        meta = file.metadata
        unpacked = sum(meta.row_group(i).total_byte_size for i in range(meta.num_row_groups))
        if unpacked > limit or meta.num_rows > limit:
            raise CorruptionError(f"{where}: claims to unpack to {unpacked} bytes, too many for its rows")
        if not file.schema_arrow.equals(schema):
            raise CorruptionError(f"{where}: not the columns of format version 1")
        # One thread: these files are small, and Arrow's threads may let go of `data` after this has returned.
        table = file.read(use_threads=False)
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError, KeyError, IndexError) as error:
        if isinstance(error, CorruptionError):
            raise
        raise CorruptionError(f"{where}: not readable as Parquet: {str(error).splitlines()[0]}") from None
    return table
