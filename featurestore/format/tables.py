"""The Parquet files: plans (task -> samples and lengths) and the samples of a bundle. Page checksums on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from distily.safety.parquet_pages import check_pages
from featurestore.errors import CorruptionError, FeatureStoreError
from featurestore.format.plan import Task
from featurestore.format.schema import Sample
from featurestore.identity import digest
from featurestore.storage.protocol import Root

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
# What a table's footer may hold: a text (its schema is one) of so many bytes, a list of so many items.
MAX_FOOTER_BYTES, MAX_FOOTER_ITEMS = 2**20, 2**16
# Every text in a table is an id or a key.
MAX_TEXT_BYTES = 64


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a table may hold: rows, values of one column, and bytes of all pages as unpacked."""

    rows: int
    values: int
    bytes: int

    @classmethod
    def of_plan(cls, size: int) -> Limits:
        """Of a plan whose file has `size` bytes. A sample id is 128 random bits, so that no row takes
        fewer than 16 bytes; a plan that lists a sample in more than one task has some less.
        """
        rows = size // 4
        return cls(rows=rows, values=rows, bytes=64 * rows + 2**16)

    @classmethod
    def of_samples(cls, task: Task) -> Limits:
        """Of the samples of a task."""
        samples = len(task.lengths)
        return cls(rows=samples, values=task.rows, bytes=16 * task.rows + 256 * samples + 2**16)


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
    table = _from_bytes(data, PLAN_SCHEMA, Limits.of_plan(len(data)), where)
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
    table = _from_bytes(data, SAMPLE_SCHEMA, Limits.of_samples(task), where)
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


def _from_bytes(data: bytes, schema: Any, limits: Limits, where: str) -> Any:
    """Read a Parquet file that claims no more than `limits`, in its footer and in the headers of its pages.

    Texts are read as dictionaries, so that one text that a page repeats takes its place in memory once; each
    of them is checked before it is repeated for each row.
    """
    texts = [field.name for field in schema if pa.types.is_string(field.type)]
    try:
        file = pq.ParquetFile(
            pa.BufferReader(data),
            page_checksum_verification=True,
            read_dictionary=texts,
            thrift_string_size_limit=MAX_FOOTER_BYTES,
            thrift_container_size_limit=MAX_FOOTER_ITEMS,
        )
        if not file.schema_arrow.equals(_with_dictionaries(schema)):
            raise CorruptionError(f"{where}: not the columns of format version 1")
        _check_claims(data, file.metadata, limits, where)
        # One thread: these files are small, and Arrow's threads may let go of `data` after this has returned.
        table = file.read(use_threads=False)
        table.validate(full=True)
        for name in texts:
            for chunk in table.column(name).chunks:
                longest = pc.max(pc.binary_length(chunk.dictionary)).as_py() or 0
                if longest > MAX_TEXT_BYTES:
                    raise CorruptionError(f"{where}: {name} holds a text of {longest} bytes, which no id has")
        return table.cast(schema)
    except (pa.ArrowException, OSError, ValueError, KeyError, IndexError) as error:
        if isinstance(error, CorruptionError):
            raise
        raise CorruptionError(f"{where}: not readable as Parquet: {str(error).splitlines()[0]}") from None


def _with_dictionaries(schema: Any) -> Any:
    """The schema as Arrow gives it where texts are read as dictionaries."""
    texts = pa.dictionary(pa.int32(), pa.string())
    return pa.schema([pa.field(f.name, texts) if pa.types.is_string(f.type) else f for f in schema])


def _check_claims(data: bytes, meta: Any, limits: Limits, where: str) -> None:
    """CorruptionError for a file that would take more memory than its rows can."""
    groups = [meta.row_group(i) for i in range(meta.num_row_groups)]
    # Readers correct sizes that some old writers got wrong, and would then read other pages than these.
    if not str(meta.created_by).startswith("parquet-cpp-arrow version"):
        raise CorruptionError(f"{where}: not written by Arrow, as all tables of this format are")
    if max(meta.num_rows, sum(max(group.num_rows, 0) for group in groups)) > limits.rows:
        raise CorruptionError(
            f"{where}: claims {meta.num_rows:,} rows, {limits.rows:,} are possible; "
            "the file is damaged or was made to harm"
        )
    size = limits.bytes
    for column in range(meta.num_columns):
        values = limits.values
        for group in groups:
            try:
                found, unpacked = check_pages(data, group.column(column), values, size)
            except ValueError as error:
                raise CorruptionError(f"{where}: {error}") from None
            values, size = values - found, size - unpacked
