"""Segments and the manifests over them: what goes in comes out, whatever the order of publications, and a
kill between any two steps of one loses nothing.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featurestore.catalogue import folding, publishing
from featurestore.catalogue.columns import from_buffer, to_bytes
from featurestore.catalogue.files import SegmentFiles
from featurestore.catalogue.folding import ListedTask, columns_of, finished, joined, pieces, taken, to_join
from featurestore.catalogue.manifest import Manifest, head_names, read_head, read_manifest
from featurestore.catalogue.pending import pending_bundles
from featurestore.catalogue.segment import Segment, check
from featurestore.catalogue.views import Without
from featurestore.format.plan import Task
from featurestore.format.records import CommitRecord, files_of
from featurestore.format.schema import GroupSpec, HiddenSpec, LogitsSpec, group_id
from featurestore.identity import SAMPLES, digest
from featurestore.maintenance.gc import collect
from featurestore.maintenance.verify import verify_store
from featurestore.reader import CacheReader
from featurestore.storage.local import LocalRoot
from featurestore.store import FeatureStore
from tests.featurestore.helpers import identity, sample, task_of

SPEC, EXTRA = HiddenSpec(1, "int8"), HiddenSpec(2, "bf16")
SPECS: dict[str, GroupSpec] = {group_id(spec): spec for spec in (SPEC, EXTRA, LogitsSpec(4))}


def listed(number: int, groups: tuple[GroupSpec | None, ...] = (None, SPEC), samples: int = 3) -> ListedTask:
    """A task that is as good as committed, of samples that overlap with those of its neighbours."""
    ids = [f"{digest(str(number + i).encode())}" for i in range(samples)]
    task = Task(tuple(ids), tuple(5 + (number + i) % 7 for i in range(samples)))
    records = {}
    for spec in groups:
        group = SAMPLES if spec is None else group_id(spec)
        stats = {} if spec is None else {"squared_error": 0.5 + number, "squared_norm": 2.0 * number + 1}
        documents = tuple((f"{number:016x}",) * (i % 2) for i in range(samples)) if spec is None else ()
        record = CommitRecord(
            task=task.id,
            group=group,
            spec=spec,
            bundle=f"{task.id}-{number:012x}",
            rows=task.rows,
            samples=samples,
            files=dict.fromkeys(files_of(spec, group), (number + 7, f"{number:016x}")),
            stats=stats,
            documents=documents,
        )
        records[group] = (record, f"{number:032x}")
    return ListedTask(task=task, records=records)


def said(segment: Segment) -> list[tuple[Any, ...]]:
    """All that a segment tells, task by task."""
    return [
        (segment.task(row), segment.records(row, SPECS), segment.record_digests(row))
        for row in range(segment.tasks)
    ]


def expected(one: ListedTask) -> tuple[Any, ...]:
    return (
        one.task,
        {group: record for group, (record, _) in one.records.items()},
        {group: seal for group, (_, seal) in one.records.items()},
    )


@given(
    st.lists(st.tuples(st.integers(0, 50), st.booleans()), min_size=1, max_size=8, unique_by=lambda p: p[0])
)
@settings(deadline=None, max_examples=40)
def test_columns_say_what_the_records_say(tasks: list[tuple[int, bool]]) -> None:
    """Written, read, joined, and with tasks taken out."""
    ones = [listed(7 * n, (None, SPEC, EXTRA) if more else (None, SPEC)) for n, more in tasks]
    data = to_bytes(finished(columns_of(ones)))
    whole = check(from_buffer(data, "here"), SPECS, "here")
    assert said(whole) == [expected(one) for one in ones]
    cut = len(ones) // 2
    parts = [columns_of(part) for part in (ones[:cut], ones[cut:]) if part]
    again = check(finished(joined(parts)), SPECS, "here")
    assert said(again) == said(whole)
    rows = np.arange(0, len(ones), 2)
    some = check(finished(taken(whole, rows)), SPECS, "here")
    assert said(some) == [expected(one) for one in ones[::2]]
    ids = np.frombuffer(bytes.fromhex("".join(s for o in ones for s in o.task.sample_ids)), np.uint8)
    places = whole.find(ids.reshape(-1, 16))
    assert [bytes(whole.columns["sample"][p]).hex() for p in places] == [
        s for o in ones for s in o.task.sample_ids
    ]
    assert (whole.find(np.zeros((1, 16), np.uint8)) == -1).all()


@given(st.lists(st.integers(1, 3000), max_size=300))
def test_segments_stay_few_and_are_seldom_rewritten(sizes: list[int]) -> None:
    most, kept, written = 4096, [], 0
    for size in sizes:
        kept.append(size)
        for run in reversed(to_join(kept, most)):
            kept[run.start : run.stop] = [sum(kept[number] for number in run)]
            written += kept[run.start]
        assert not to_join(kept, most)
    assert sum(kept) == sum(sizes) and all(size <= most for size in kept)
    total = max(sum(sizes), 1)
    # Two neighbours that do not join are more than `most` together, or the first more than twice the rest.
    assert len(kept) <= 2 * (total / most + 1) + np.log2(most) + 2
    assert written <= total * (np.log2(most) + 2)


def test_a_task_of_many_samples_is_alone() -> None:
    ones = [listed(n, samples=size) for n, size in ((0, 3), (100, 9), (200, 2), (300, 2))]
    assert [len(piece) for piece in pieces(ones, most=4)] == [1, 1, 2]


@given(st.integers(0, 40), st.data())
def test_a_range_without_some(total: int, data: st.DataObject) -> None:
    gone = sorted(data.draw(st.sets(st.integers(0, max(total - 1, 0)), max_size=total)))
    gone = [number for number in gone if number < total]
    view, wanted = Without(total, gone), [n for n in range(total) if n not in gone]
    assert list(view) == wanted and len(view) == len(wanted) and view == wanted
    assert [view[place] for place in range(-len(wanted), len(wanted))] == [*wanted, *wanted]
    assert view.at(np.arange(len(wanted))).tolist() == wanted
    assert [n in view for n in range(-1, total + 1)] == [n in wanted for n in range(-1, total + 1)]
    stop = data.draw(st.integers(0, total + 1))
    assert list(view[:stop]) == wanted[:stop] and list(view[1:stop]) == wanted[1:stop]


# Publication. Tasks of samples alone: what matters here is what a manifest lists.


def commit(store: FeatureStore, numbers: list[int], spec: GroupSpec | None = None) -> Task:
    members = [sample(n, 3 + n % 5) for n in numbers]
    task = task_of(members)
    store.add_plan([task])
    store.write_bundle(task, members, {})
    return task


def check_lists(path: Path, numbers: set[int], tasks: int) -> Manifest:
    """The newest manifest has these samples, each once, and that many tasks."""
    reader = CacheReader.open(path)
    assert sorted(reader.sample_ids) == sorted(sample(n, 3 + n % 5).id for n in numbers)
    assert reader.shards == tasks
    assert [reader.read(i).id for i in range(len(reader))] == list(reader.sample_ids)
    manifest = read_manifest(LocalRoot(path), reader.manifest_digest)
    assert isinstance(manifest, Manifest)
    return manifest


def test_many_publications_fold_into_few_segments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folding, "SEGMENT_SAMPLES", 24)
    monkeypatch.setattr(to_join, "__defaults__", (24,))
    monkeypatch.setattr(pieces, "__defaults__", (24,))
    store = FeatureStore.create(tmp_path / "s", identity())
    digests = []
    for n in range(30):
        # Each shares a sample with the one before.
        commit(store, [2 * n, 2 * n + 1, 2 * n + 2])
        digests.append(store.publish_manifest().digest)
        assert not pending_bundles(store.root) and len(head_names(store.root)) == 1
    manifest = check_lists(tmp_path / "s", set(range(61)), 30)
    assert manifest.samples == 61 and manifest.tasks == 30 and len(manifest.segments) <= 8
    assert manifest.totals[SAMPLES].rows == sum(
        3 + n % 5 for k in range(30) for n in (2 * k, 2 * k + 1, 2 * k + 2)
    )
    assert verify_store(tmp_path / "s", deep=True).sound
    # Any of the old manifests reads what it listed.
    for n in (0, 11, 22):
        assert len(CacheReader.open(tmp_path / "s", digests[n])) == 2 * n + 3
    assert store.publish_manifest().digest == digests[-1]
    inventory = store.inventory()
    assert inventory.plans == {} and inventory.loose == {}
    held = inventory.holding([sample(7, 5).id, sample(40, 3).id, sample(900, 3).id])
    assert {s for task in held.values() for s in task.sample_ids} >= {sample(7, 5).id, sample(40, 3).id}
    assert len(held) <= 4 and inventory.committed(held) == {SAMPLES: set(held)}


def test_planning_costs_what_is_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A streamed run plans portion by portion, and what it has committed is not looked at each time."""
    store = FeatureStore.create(tmp_path / "s", identity())
    for n in range(3):
        commit(store, [2 * n, 2 * n + 1])
    with monkeypatch.context() as patched:
        for name in ("names", "load", "fetch"):
            patched.delattr(LocalRoot, name)
        store.add_plan([task_of([sample(100, 3)])])
    assert len(store.known_tasks()) == 4
    store.publish_manifest()
    # Those of which all is listed are forgotten.
    assert len(store.inventory().plans) == 1 == len(store._plans)


def test_two_publishers_leave_two_heads_and_the_next_lists_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each lists what the other does not, as when both looked at the same moment."""
    store = FeatureStore.create(tmp_path / "s", identity())
    commit(store, [0, 1])
    store.publish_manifest()
    shared = head_names(store.root)
    monkeypatch.setattr(publishing, "ATTEMPTS", 1)
    for number in (10, 20):
        commit(store, [number, 1, 5])
        store.publish_manifest()
        # The other publisher has not seen this one: what it removed is back, what it made is out of sight.
        made = head_names(store.root)
        (tmp_path / f"aside{number}").write_bytes((tmp_path / "s" / "heads" / made[0]).read_bytes())
        (tmp_path / "s" / "heads" / made[0]).rename(tmp_path / made[0])
        (tmp_path / "s" / "heads" / shared[0]).write_bytes(f"{shared[0].split('-')[2]}\n".encode())
    (tmp_path / "s" / "heads" / shared[0]).unlink()
    for head in tmp_path.glob("0*"):
        head.rename(tmp_path / "s" / "heads" / head.name)
    heads = head_names(store.root)
    assert len(heads) == 2
    first = [set(CacheReader.open(tmp_path / "s", head.split("-")[2]).sample_ids) for head in heads]
    assert first[0] != first[1] and not first[0] <= first[1]
    store.publish_manifest()
    assert len(head_names(store.root)) == 1
    check_lists(tmp_path / "s", {0, 1, 5, 10, 20}, 3)
    assert verify_store(tmp_path / "s", deep=True).sound


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours catches it."""


class Mortal(LocalRoot):
    """A directory whose process dies before the n-th operation that changes something."""

    def __init__(self, path: Path, steps: int) -> None:
        super().__init__(path)
        self.steps = steps

    def _step(self) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise Killed

    def publish(self, name: str, data: bytes) -> bool:
        self._step()
        return super().publish(name, data)

    def remove(self, name: str, spare: Callable[[str], bool]) -> None:
        self._step()
        super().remove(name, spare)


def test_a_kill_before_any_step_loses_nothing(tmp_path: Path) -> None:
    """Of writing, committing and publishing, over growing stores: at each point the store
    lists a whole manifest of before or of after, and the same command then lists all.
    """
    path, kills = tmp_path / "s", 0
    FeatureStore.create(path, identity())
    numbers: set[int] = set()
    tasks = 0
    for round_ in range(12):
        wanted = [[100 * round_ + n, 100 * round_ + n + 1] for n in range(0, 2 * (1 + round_ % 3), 2)]
        steps = 0
        while True:
            store = FeatureStore(Mortal(path, steps), identity())
            try:
                for pair in wanted:
                    commit(store, pair)
                store.publish_manifest()
            except Killed:
                kills += 1
                steps += 1
                if tasks:
                    lengths = len(CacheReader.open(path))
                    assert lengths >= len(numbers)
                continue
            break
        numbers |= {n for pair in wanted for n in pair}
        tasks += len(wanted)
        check_lists(path, numbers, tasks)
        assert not pending_bundles(LocalRoot(path)) and len(head_names(LocalRoot(path))) == 1
    assert kills >= 50 and verify_store(path, deep=True).sound


def test_what_no_marker_names_is_found_and_listed(tmp_path: Path) -> None:
    store = FeatureStore.create(tmp_path / "s", identity())
    commit(store, [0, 1])
    store.publish_manifest()
    task = commit(store, [2, 3])
    for bundle in pending_bundles(store.root):
        (tmp_path / "s" / "pending" / f"{bundle}.json").unlink()
    store.publish_manifest()
    check_lists(tmp_path / "s", {0, 1}, 1)
    (problem,) = verify_store(tmp_path / "s", deep=True).problems
    assert problem.path == f"commit/samples/{task.id}.json" and "gc --delete" in problem.what
    assert collect(tmp_path / "s").unlisted == 1
    assert collect(tmp_path / "s", delete=True).unlisted == 1
    check_lists(tmp_path / "s", {0, 1, 2, 3}, 2)
    assert verify_store(tmp_path / "s", deep=True).sound and not collect(tmp_path / "s").unlisted


def test_the_marker_of_a_killed_writer_is_garbage(tmp_path: Path) -> None:
    store = FeatureStore.create(tmp_path / "s", identity())
    commit(store, [0, 1])
    store.publish_manifest()
    members = [sample(9, 4)]
    store.prepare_bundle(task_of(members), members, {})
    (bundle,) = pending_bundles(store.root)
    store.publish_manifest()
    assert pending_bundles(store.root) == [bundle], "its writer may be at work"
    assert not any(orphan.removable for orphan in collect(tmp_path / "s", delete=True).orphans)
    os.utime(tmp_path / "s" / "pending" / f"{bundle}.json", (0, 0))
    found = collect(tmp_path / "s", delete=True, min_age=0.0)
    assert {orphan.path for orphan in found.orphans} == {f"parts/{bundle}", f"pending/{bundle}.json"}
    assert not pending_bundles(store.root) and verify_store(tmp_path / "s", deep=True).sound


def _race(path: Path, numbers: list[int], ready: Any) -> None:
    store = FeatureStore.open(path)
    ready.wait()
    for n in numbers:
        commit(store, [n, n + 1])
        store.publish_manifest()


def test_racing_processes_that_publish_list_everything(tmp_path: Path) -> None:
    path = tmp_path / "s"
    FeatureStore.create(path, identity())
    server = multiprocessing.get_context("fork")
    ready = server.Barrier(3)
    writers = [server.Process(target=_race, args=(path, list(range(w, 60, 6)), ready)) for w in (0, 2, 4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    FeatureStore.open(path).publish_manifest()
    check_lists(path, set(range(60)), 30)
    assert verify_store(path, deep=True).sound and not pending_bundles(LocalRoot(path))


def test_a_worker_gets_the_place_and_the_digest_alone(tmp_path: Path) -> None:
    import pickle

    store = FeatureStore.create(tmp_path / "s", identity())
    for n in range(0, 40, 2):
        commit(store, [n, n + 1])
    store.publish_manifest()
    reader = CacheReader.open(tmp_path / "s")
    assert len(pickle.dumps(reader)) < 1000 + len(str(tmp_path))
    assert reader.catalogue._files._open == {}, "nothing is mapped before it is touched"
    head = read_head(store.root, head_names(store.root)[-1])
    files = SegmentFiles(store.root, head.segments, head.groups)
    assert sum(files.checked(n).tasks for n in range(len(files))) == 20
    with contextlib.suppress(IndexError):
        reader.read(len(reader))
    order = list(range(len(reader)))
    random.Random(0).shuffle(order)
    assert [reader.read(i).id for i in order] == [reader.sample_ids[i] for i in order]
