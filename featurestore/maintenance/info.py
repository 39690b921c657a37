"""What a store holds, summed up by its manifest, and by the records that it does not list yet: nothing of the
data is read.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from featurestore.catalogue.manifest import GroupTotals, fullest_manifest
from featurestore.format.kinds.table import kind_of
from featurestore.format.schema import GroupSpec, TeacherIdentity
from featurestore.identity import SAMPLES
from featurestore.store import FeatureStore


@dataclass(frozen=True, kw_only=True)
class GroupInfo:
    """One column group over all tasks that have it. bytes_per_row: bytes on disk per position.

    arrays: bytes per array (metadata included). mean_head_size, mean_head_mass, mean_entropy (nats) and
    perplexity (of the teacher, on the next tokens) are None for groups other than logits, the last two also
    for partial ones, where the known labels are the likely ones. relative_error: sqrt(sum of squared errors /
    sum of squares) of hidden states as stored, against those that the worker had; None for other groups and
    where nothing was measured. share_of_positions: of hidden states that are stored at a part of them, which
    are the further ones of a share that was extended; None for other groups.
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
    share_of_positions: float | None = None


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
    inventory = store.inventory()
    totals, specs, left = inventory.totals, inventory.specs, inventory.unfinished
    samples, rows = sum(inventory.lengths.values()), totals[SAMPLES].rows if SAMPLES in totals else 0
    done = totals[SAMPLES].tasks if SAMPLES in totals else 0
    groups = {group: _group(sums, specs.get(group), done + len(left)) for group, sums in totals.items()}
    return StoreInfo(
        path=str(store.path),
        identity=store.identity,
        manifest=fullest_manifest(store.root),
        samples=samples,
        rows=rows,
        samples_planned=samples + sum(len(task.lengths) for task in left),
        rows_planned=rows + sum(task.rows for task in left),
        bytes=sum(group.bytes for group in groups.values()),
        groups=groups,
        sidecar={part: stamp[0] for part, (_, stamp) in store.sidecar().items()},
        length_histogram={f"{2**b}-{2 ** (b + 1) - 1}": n for b, n in inventory.lengths.items()},
        provenance=store.provenance(),
        unrecorded=store.unrecorded_runs(),
    )


def _group(sums: GroupTotals, spec: GroupSpec | None, tasks_total: int) -> GroupInfo:
    return GroupInfo(
        kind=SAMPLES if spec is None else spec.kind,
        spec=None if spec is None else spec.to_json(),
        tasks_done=sums.tasks,
        tasks_total=tasks_total,
        rows=sums.rows,
        bytes=sums.size,
        bytes_per_row=sums.size / sums.rows,
        arrays=dict(sums.files),
        **({} if spec is None else kind_of(spec).measures(spec, sums.stats, sums.rows)),
    )
