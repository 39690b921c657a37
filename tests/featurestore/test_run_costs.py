"""What runs cost is counted once each: from their provenance record, else from the shards that they left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featurestore.catalogue.manifest import latest_runs
from featurestore.errors import StoreFormatError
from featurestore.format.plan import split_tasks
from featurestore.format.records import CommitRecord, RunCost, unrecorded
from featurestore.format.schema import GroupSpec, LogitsSpec
from featurestore.maintenance.info import store_info
from featurestore.maintenance.merge import merge_stores
from featurestore.store import FeatureStore
from tests.featurestore.helpers import features, identity, sample

SPENT = st.lists(st.tuples(st.integers(1, 1000), st.floats(0, 1e6)), min_size=1, max_size=6)


def record(number: int, run: RunCost | None) -> CommitRecord:
    task = f"{number:016x}"
    return CommitRecord(
        task=task,
        group="samples",
        spec=None,
        bundle=f"{task}-{'0' * 12}",
        rows=1,
        samples=1,
        files={"samples.parquet": (1, "0" * 16)},
        stats={},
        run=run,
    )


@given(st.lists(st.tuples(SPENT, st.booleans()), max_size=5), st.randoms())
def test_every_run_counts_once(runs: list[tuple[list[tuple[int, float]], bool]], order: Any) -> None:
    """The total over provenance and shards is what all runs spent, in whatever order the records are read."""
    records, provenance, seconds, tokens = [record(0, None)], [{"argv": []}, {"run": ["any"]}], 0.0, 0
    for number, (shards, recorded) in enumerate(runs):
        run = RunCost(id=f"{number:016x}")
        for rows, took in shards:
            run = RunCost(
                id=run.id, tokens=run.tokens + rows, capture_seconds=run.capture_seconds + took + 1.0
            )
            records += [record(1, run)] * 2  # a shard has a record for each of its groups
        if recorded:
            provenance.append({"run": run.id})
        else:
            seconds, tokens = seconds + run.capture_seconds, tokens + run.tokens
    read = [CommitRecord.from_bytes(one.to_bytes(), "samples", one.task, "here") for one in records]
    assert read == records
    order.shuffle(read)
    found = unrecorded(latest_runs(one.run for one in read if one.run).values(), provenance)
    assert sum(run.tokens for run in found) == tokens
    assert sum(run.capture_seconds for run in found) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "change",
    [
        {"id": "x"},
        {"id": None},
        {"tokens": 0},
        {"tokens": 1.5},
        {"engine_seconds": "1"},
        {"engine_seconds": True},
        {"capture_seconds": -1.0},
        {"capture_seconds": 1e300},
    ],
)
def test_nonsense_is_refused(change: dict[str, Any]) -> None:
    sound: dict[str, Any] = {"id": "0" * 16, "tokens": 1, "engine_seconds": 1, "capture_seconds": 0.5}
    assert RunCost.from_json(sound, "here").engine_seconds == 1.0
    with pytest.raises(StoreFormatError, match="here"):
        RunCost.from_json({**sound, **change}, "here")


def test_merging_and_a_further_group_carry_it(tmp_path: Path) -> None:
    """Records of two runs in one task; only the finished one has a provenance record."""
    samples = {one.id: one for one in (sample(seed, 10) for seed in range(4))}
    (task,) = split_tasks([(one.id, len(one)) for one in samples.values()], 40)
    members = [samples[one] for one in task.sample_ids]
    store = FeatureStore.create(tmp_path / "store", identity())
    store.add_plan([task])
    ended = RunCost(id="a" * 16, tokens=task.rows, capture_seconds=2.0)
    killed = RunCost(id="b" * 16, tokens=task.rows, engine_seconds=1.5, capture_seconds=3.0)
    groups: list[GroupSpec] = [LogitsSpec(4), LogitsSpec(8)]
    for group, run in zip(groups, (ended, killed), strict=True):
        store.write_bundle(task, members, features(members, [group]), run)
    store.add_provenance({"run": ended.id, "tokens": task.rows, "capture_seconds": 2.25})
    store.publish_manifest()
    merge_stores(tmp_path / "merged", [tmp_path / "store"])
    for path in (tmp_path / "store", tmp_path / "merged"):
        assert [run["capture_seconds"] for run in store_info(path).runs] == [2.25, 3.0]
        (left,) = store_info(path).unrecorded
        assert (left["run"], left["tokens"], left["engine_seconds"]) == (killed.id, task.rows, 1.5)
