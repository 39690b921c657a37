"""The shards of a store, one by one: those that its manifest lists, and those that it does not yet."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from featurestore.catalogue.segment import Segment
from featurestore.identity import SAMPLES
from featurestore.store import FeatureStore


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One task. groups: committed column groups and their bytes; complete: has all that any shard has."""

    task: str
    samples: int
    rows: int
    groups: dict[str, int]
    bytes: int
    complete: bool

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self)


def list_shards(path: str | Path) -> list[Shard]:
    """Every shard: those that the manifest lists in its order, then the others in the order of the plans.

    Raises what FeatureStore and its records raise.
    """
    inventory = FeatureStore.open(path).inventory()
    groups = inventory.totals.keys()
    loose = {
        task: {group: record.size for group, (record, _) in one.records.items()}
        for task, one in inventory.loose.items()
    }
    shards = []
    for number in range(len(inventory.segments)):
        segment = inventory.segments.checked(number)
        for row, (samples, rows, sizes) in enumerate(_of_segment(segment)):
            task = segment.task_id(row)
            shards.append(_shard(task, samples, rows, {**sizes, **loose.pop(task, {})}, groups))
    listed = {shard.task for shard in shards}
    others = {**inventory.planned, **{task: inventory.loose[task].task for task in loose}}
    shards += [
        _shard(task.id, len(task.lengths), task.rows, loose.get(task.id, {}), groups)
        for task in others.values()
        if task.id not in listed
    ]
    return shards


def _of_segment(segment: Segment) -> Iterator[tuple[int, int, dict[str, int]]]:
    """Samples, positions and bytes by group of each task."""
    c = segment.columns
    rows = np.add.reduceat(c["length"], c["sample_start"][:-1], dtype=np.int64).tolist()
    sizes = np.add.reduceat(c["file_size"], c["file_start"][:-1], dtype=np.int64).tolist()
    names = [segment.groups[group] for group in c["record_group"].tolist()]
    samples = np.diff(c["sample_start"]).tolist()
    for row, (start, end) in enumerate(pairwise(c["record_start"].tolist())):
        yield samples[row], rows[row], dict(zip(names[start:end], sizes[start:end], strict=True))


def _shard(task: str, samples: int, rows: int, sizes: dict[str, int], groups: Collection[str]) -> Shard:
    return Shard(
        task=task,
        samples=samples,
        rows=rows,
        groups=dict(sorted(sizes.items())),
        bytes=sum(sizes.values()),
        complete=SAMPLES in sizes and len(sizes) == len(groups),
    )
