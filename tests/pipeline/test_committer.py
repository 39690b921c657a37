"""Encoders side by side: the same store as from one, commits in order, and an error that nothing hides."""

from __future__ import annotations

import errno
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from featurestore.catalogue.pending import pending_bundles
from featurestore.errors import StoreWriteError
from featurestore.format.plan import Task, Work
from featurestore.format.records import RunCost
from featurestore.format.schema import GroupFeatures, GroupSpec, HiddenSpec, LogitsSpec, Sample
from featurestore.maintenance.verify import verify_store
from featurestore.reader import CacheReader
from featurestore.store import FeatureStore
from pipeline.generate.capturing import capture_tasks
from pipeline.generate.committer import Committer
from pipeline.progress import ConsoleReporter
from tests.featurestore.helpers import features, identity, sample, task_of

GROUPS: tuple[GroupSpec, ...] = (LogitsSpec(6, 0.9, 4), HiddenSpec(2, "int8"))
SHARDS = [[sample(10 * shard + i, 30) for i in range(3)] for shard in range(4)]
SAMPLES = {one.id: one for shard in SHARDS for one in shard}
TASKS = [task_of(shard) for shard in SHARDS]
SILENT = ConsoleReporter(Console(quiet=True))
Arrays = Mapping[GroupSpec, GroupFeatures]


def captured(members: Sequence[Sample]) -> list[Arrays]:
    found = features(list(members), list(GROUPS))
    return [{group: found[group][i] for group in GROUPS} for i in range(len(members))]


def commit_all(path: Path, encoders: int) -> FeatureStore:
    store = FeatureStore.create(path, identity())
    store.add_plan(TASKS)
    with Committer(store, SILENT, 0, 360, RunCost(id="0" * 16), encoders) as committer:
        for task, members in zip(TASKS, SHARDS, strict=True):
            committer.put(task, members, GROUPS, captured(members))
    store.publish_manifest()
    return store


def contents(store: FeatureStore) -> dict[tuple[str, ...], bytes]:
    """Every file of the committed bundles, by its task instead of the random name of its bundle."""
    root = Path(store.path)
    return {
        (group, task, name): (root / "parts" / record.bundle / name).read_bytes()
        for group, records in store.commits().items()
        for task, record in records.items()
        for name in record.files
    }


@pytest.fixture
def committed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Tasks in the order in which they are committed."""
    order: list[str] = []
    real = FeatureStore.commit

    def commit(store: FeatureStore, records: Sequence[Any]) -> None:
        real(store, records)
        order.extend(dict.fromkeys(record.task for record in records))

    monkeypatch.setattr(FeatureStore, "commit", commit)
    return order


def test_several_encoders_write_what_one_writes(tmp_path: Path) -> None:
    one, three = (commit_all(tmp_path / str(encoders), encoders) for encoders in (1, 3))
    assert contents(one) == contents(three)
    assert verify_store(three.path, deep=True).sound


def test_shards_are_committed_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, committed: list[str]
) -> None:
    """The first shard is ready only when the second and the third are."""
    ready, others = threading.Semaphore(0), TASKS[1:3]
    real = FeatureStore.prepare_bundle

    def prepare(store: FeatureStore, task: Task, *args: Any) -> Any:
        for _ in others if task is TASKS[0] else []:
            assert ready.acquire(timeout=60)
        records = real(store, task, *args)
        ready.release()
        return records

    monkeypatch.setattr(FeatureStore, "prepare_bundle", prepare)
    store = commit_all(tmp_path, encoders=3)
    assert committed == [task.id for task in TASKS]
    costs = [store.commits()["samples"][task.id].run for task in TASKS]
    assert [cost.tokens for cost in costs if cost] == [90 * (i + 1) for i in range(4)]


@pytest.mark.parametrize("encoders", [1, 3])
def test_an_error_of_an_encoder_ends_the_capture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, committed: list[str], encoders: int
) -> None:
    """A full disk at the second shard: what is committed stays, and the same tasks complete the store."""
    real = FeatureStore.prepare_bundle

    def prepare(store: FeatureStore, task: Task, *args: Any) -> Any:
        if task is TASKS[1]:
            raise StoreWriteError("cannot write: No space left on device") from OSError(errno.ENOSPC)
        return real(store, task, *args)

    with monkeypatch.context() as patched:
        patched.setattr(FeatureStore, "prepare_bundle", prepare)
        with pytest.raises(StoreWriteError, match="No space left"):
            commit_all(tmp_path, encoders)
    assert committed[0] == TASKS[0].id and TASKS[1].id not in committed
    assert len(committed) <= 2 + encoders
    commit_all(tmp_path, encoders)
    assert verify_store(tmp_path, deep=True).sound and set(committed) == {task.id for task in TASKS}


def test_a_long_run_publishes_manifests_on_its_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who opens the store meanwhile finds all shards but the last ones, and no marker is left of them."""
    monkeypatch.setattr("pipeline.generate.committer.SHARDS_PER_MANIFEST", 3)
    store = FeatureStore.create(tmp_path, identity())
    with Committer(store, SILENT, 0, 360, RunCost(id="0" * 16)) as committer:
        for task, members in zip(TASKS, SHARDS, strict=True):
            store.add_plan([task])
            committer.put(task, members, GROUPS, captured(members))
    assert CacheReader.open(tmp_path).shards == 3
    assert [marker.partition("-")[0] for marker in pending_bundles(store.root)] == [TASKS[3].id]
    store.publish_manifest()
    assert CacheReader.open(tmp_path).shards == 4 and verify_store(tmp_path, deep=True).sound


class Early:
    """An engine that wants `ahead` positions beyond the shard that is read.

    most: samples that it was given at most and nobody had read yet.
    """

    def __init__(self, ahead: int) -> None:
        self.ahead, self.given, self.most = ahead, 0, 0

    def capture(self, prompts: Sequence[Any]) -> Any:
        self.given += len(prompts)
        names = {id(one.tokens): one.id for one in SAMPLES.values()}
        return self._captured([names[id(tokens)] for tokens in prompts])

    def _captured(self, names: list[str]) -> Any:
        for name in names:
            self.most = max(self.most, self.given)
            self.given -= 1
            yield [name]

    def close(self) -> None: ...


@pytest.mark.parametrize(("ahead", "shards"), [(0, 1), (1, 2), (90, 2), (91, 3), (10_000, 4)])
def test_an_engine_is_given_later_shards_early(ahead: int, shards: int) -> None:
    engine = Early(ahead)
    given = [(Work(task, GROUPS, True), members) for task, members in zip(TASKS, SHARDS, strict=True)]
    store: Any = SimpleNamespace(holds=lambda *_: False)
    put: dict[str, list[Arrays]] = {}
    committer: Any = SimpleNamespace(put=lambda task, _samples, _groups, given: put.update({task.id: given}))
    assert capture_tasks(store, engine, given, committer, SILENT) == 360
    assert engine.most == 3 * shards and engine.given == 0
    assert put == {task.id: [[sample_id] for sample_id in task.sample_ids] for task in TASKS}
