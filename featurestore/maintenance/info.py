"""What a store holds, summed up from its records alone: nothing of the data is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from featurestore.format.directory import fullest_manifest
from featurestore.format.kinds.table import kind_of
from featurestore.format.plan import Task
from featurestore.format.records import CommitRecord, sum_stats
from featurestore.format.schema import TeacherIdentity
from featurestore.identity import SAMPLES
from featurestore.store import FeatureStore


@dataclass(frozen=True, kw_only=True)
class GroupInfo:
    """One column group over all tasks that have it. bytes_per_row: bytes on disk per position.

    arrays: bytes per array (metadata included). mean_head_size, mean_head_mass, mean_entropy (nats) and
    perplexity (of the teacher, on the next tokens) are None for groups other than logits, the last two also
    for partial ones, where the known labels are the likely ones. relative_error: sqrt(sum of squared errors /
    sum of squares) of hidden states as stored, against those that the worker had; None for other groups and
    where nothing was measured.
    """

    kind: str
    spec: dict[str, Any] | None
    tasks_done: int
    tasks_total: int
    rows: int
    bytes: int
    bytes_per_row: float
    arrays: dict[str, int]
    mean_head_size: float | None = None
    mean_head_mass: float | None = None
    mean_entropy: float | None = None
    perplexity: float | None = None
    relative_error: float | None = None


@dataclass(frozen=True, kw_only=True)
class StoreInfo:
    """samples, rows: of tasks whose samples are committed; the planned ones include the rest.

    length_histogram: committed samples by length, keyed "low-high" in powers of two. manifest: digest of
    the one that a reader takes, or None. sidecar: part -> bytes, of the teacher's sidecar.
    provenance: the records of the runs, oldest first; unrecorded: the cost of those that left none.
    """

    path: str
    identity: TeacherIdentity
    manifest: str | None
    samples: int
    rows: int
    samples_planned: int
    rows_planned: int
    bytes: int
    groups: dict[str, GroupInfo]
    sidecar: dict[str, int]
    length_histogram: dict[str, int]
    provenance: list[dict[str, Any]]
    unrecorded: list[dict[str, Any]]

    @property
    def runs(self) -> list[dict[str, Any]]:
        """What every run cost, also of those that left no record."""
        return [*self.provenance, *self.unrecorded]

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self)


def store_info(path: str | Path) -> StoreInfo:
    """Sum up a store: teacher, samples, rows, column groups and their bytes, what it cost.

    Args:
        path: a local directory, s3://bucket/prefix or gs://bucket/prefix.

    Returns:
        The sums as attributes; `to_json()` makes a JSON object of them.

    Raises:
        StoreNotFoundError: there is no store.
        StoreFormatError: a record is not of this format.
        CorruptionError: a record is damaged.
        StoreAccessError: the object store does not answer.

    Example:
        store_info("run/cache").rows
    """
    store = FeatureStore.open(path)
    tasks = store.known_tasks()
    commits = store.commits()
    groups = {group: _group(records, len(tasks)) for group, records in commits.items() if records}
    done = [tasks[task] for task in commits.get(SAMPLES, {}) if task in tasks]
    return StoreInfo(
        path=str(store.path),
        identity=store.identity,
        manifest=fullest_manifest(store.root),
        samples=sum(len(task.lengths) for task in done),
        rows=sum(task.rows for task in done),
        samples_planned=sum(len(task.lengths) for task in tasks.values()),
        rows_planned=sum(task.rows for task in tasks.values()),
        bytes=sum(group.bytes for group in groups.values()),
        groups=groups,
        sidecar={part: stamp[0] for part, (_, stamp) in store.sidecar().items()},
        length_histogram=_histogram(done),
        provenance=store.provenance(),
        unrecorded=store.unrecorded_runs(),
    )


def _group(records: Mapping[str, CommitRecord], tasks_total: int) -> GroupInfo:
    first = next(iter(records.values()))
    rows = sum(record.rows for record in records.values())
    size = sum(record.size for record in records.values())
    arrays: dict[str, int] = {}
    for record in records.values():
        for name, (length, _) in record.files.items():
            # <group id>/<array>/..., <group id>/zarr.json, or samples.parquet
            parts = name.split("/")
            array = parts[1] if len(parts) > 2 else parts[-1]
            arrays[array] = arrays.get(array, 0) + length
    stats = sum_stats(records.values())
    return GroupInfo(
        kind=SAMPLES if first.spec is None else first.spec.kind,
        spec=None if first.spec is None else first.spec.to_json(),
        tasks_done=len(records),
        tasks_total=tasks_total,
        rows=rows,
        bytes=size,
        bytes_per_row=size / rows,
        arrays=dict(sorted(arrays.items())),
        **({} if first.spec is None else kind_of(first.spec).measures(first.spec, stats, rows)),
    )


def _histogram(tasks: list[Task]) -> dict[str, int]:
    counts: dict[int, int] = {}
    for task in tasks:
        for length in task.lengths:
            bucket = length.bit_length() - 1
            counts[bucket] = counts.get(bucket, 0) + 1
    return {f"{2**b}-{2 ** (b + 1) - 1}": counts[b] for b in sorted(counts)}
