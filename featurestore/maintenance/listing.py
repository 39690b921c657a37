"""The shards of a store, one by one, from plans and commit records alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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
    """Every planned shard, in the order of the plans. Raises what FeatureStore and its records raise."""
    store = FeatureStore.open(path)
    commits = {group: records for group, records in store.commits().items() if records}
    shards = []
    for task in store.known_tasks().values():
        sizes = {group: records[task.id].size for group, records in commits.items() if task.id in records}
        shards.append(
            Shard(
                task=task.id,
                samples=len(task.lengths),
                rows=task.rows,
                groups=sizes,
                bytes=sum(sizes.values()),
                complete=SAMPLES in sizes and len(sizes) == len(commits),
            )
        )
    return shards
