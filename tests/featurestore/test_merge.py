"""Merging stores: the union, once, with every byte checked; killed, damaged and foreign sources."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

import featurestore.maintenance.merge
import featurestore.storage.local
from featurestore.errors import CorruptionError, SpecMismatchError, StoreNotFoundError
from featurestore.format.plan import split_tasks
from featurestore.format.schema import GroupSpec, HiddenSpec, LogitsSpec, group_id
from featurestore.identity import SAMPLES
from featurestore.maintenance.merge import merge_stores
from featurestore.maintenance.verify import verify_store
from featurestore.reader import CacheReader
from featurestore.store import FeatureStore
from tests.featurestore.conftest import Filled
from tests.featurestore.helpers import assert_same, features, identity, sample

LOGITS, HIDDEN = LogitsSpec(8, 0.9), HiddenSpec(1, "bf16")


def make(path: Path, seeds: range, specs: list[GroupSpec], apart: bool = False) -> Path:
    """A store of the samples `seeds`, four to a task; `apart`: each group in a bundle of its own."""
    store = FeatureStore.create(path, identity())
    samples = {one.id: one for one in (sample(seed, 10) for seed in seeds)}
    tasks = split_tasks([(one.id, len(one)) for one in samples.values()], 40)
    store.add_plan(tasks)
    store.put_teacher_files({"config.json": b"{}"})
    for task in tasks:
        members = [samples[one] for one in task.sample_ids]
        for chosen in [[spec] for spec in specs] if apart else [specs]:
            store.write_bundle(task, members, features(members, chosen))
    store.add_provenance({"seeds": list(seeds)})
    store.publish_manifest()
    return path


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two stores that share the task of samples 4 to 7; the second alone has hidden states of it."""
    return make(tmp_path / "a", range(8), [LOGITS]), make(
        tmp_path / "b", range(4, 12), [LOGITS, HIDDEN], True
    )


def files_of(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


def check_union(path: Path) -> None:
    """Twelve samples, each with the distribution that went in, those of the second with hidden states."""
    assert verify_store(path, deep=True).sound
    reader = CacheReader.open(path)
    given = {one.id: one for one in (sample(seed, 10) for seed in range(12))}
    assert sorted(reader.sample_ids) == sorted(given)
    for index, one in enumerate(reader.sample_ids):
        assert_same(
            reader.read(index, [LOGITS]).features[LOGITS], features([given[one]], [LOGITS])[LOGITS][0]
        )
    commits = FeatureStore.open(path).commits()
    assert {group: len(tasks) for group, tasks in commits.items()} == {
        SAMPLES: 3,
        group_id(LOGITS): 3,
        group_id(HIDDEN): 2,
    }


def test_union_of_overlapping_stores(pair: tuple[Path, Path], tmp_path: Path) -> None:
    target = tmp_path / "all"
    seen: list[tuple[int, int]] = []
    merged = merge_stores(target, pair, lambda done, total: seen.append((done, total)))
    check_union(target)
    # Of the shared task the second store adds the hidden states alone.
    assert (merged.sources, merged.tasks, merged.records) == (2, 3, 4 + 3 + 1)
    assert seen[-1] == (merged.bytes, merged.bytes) and len(seen) == 4
    on_disk = sum(f.stat().st_size for f in (target / "parts").rglob("*") if f.is_file())
    assert on_disk == merged.bytes
    assert [r["seeds"][0] for r in FeatureStore.open(target).provenance()] == [0, 4]
    assert (target / "teacher" / "config.json").read_bytes() == b"{}"


def test_bundles_keep_their_names_and_their_bytes(filled: Filled, tmp_path: Path) -> None:
    target = tmp_path / "copy"
    merge_stores(target, [filled.path])
    source, copied = files_of(filled.path), files_of(target)
    assert {n: b for n, b in copied.items() if n.startswith(("parts/", "commit/"))} == {
        n: b for n, b in source.items() if n.startswith(("parts/", "commit/"))
    }


def test_merging_again_changes_nothing(pair: tuple[Path, Path], tmp_path: Path) -> None:
    target = tmp_path / "all"
    first = merge_stores(target, pair)
    before = files_of(target)
    again = merge_stores(target, pair)
    assert files_of(target) == before
    assert (again.records, again.bytes, again.manifest) == (0, 0, first.manifest)


def test_a_store_keeps_its_own_records(pair: tuple[Path, Path]) -> None:
    before = files_of(pair[0])
    merge_stores(pair[0], [pair[1]])
    check_union(pair[0])
    kept = {name: data for name, data in before.items() if not name.startswith("heads/")}
    assert kept.items() <= files_of(pair[0]).items()


def test_into_itself(pair: tuple[Path, Path]) -> None:
    before = files_of(pair[0])
    assert merge_stores(pair[0], [pair[0]]).records == 0
    assert files_of(pair[0]) == before


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_file_is_named_and_its_task_left_out(
    pair: tuple[Path, Path], tmp_path: Path, damage: str
) -> None:
    """The hidden states lie in another bundle than the logits of the same task, and are copied first."""
    record = sorted(FeatureStore.open(pair[1]).commits()[group_id(LOGITS)].items())[-1][1]
    victim = pair[1] / "parts" / record.bundle / group_id(LOGITS) / "head_gaps" / "c" / "0"
    data = victim.read_bytes()
    if damage == "remove":
        victim.unlink()
    else:
        victim.write_bytes(data[:-1] if damage == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
    target = tmp_path / "all"
    with pytest.raises(CorruptionError, match=str(victim)):
        merge_stores(target, [pair[1]])
    committed = FeatureStore.open(target).commits()
    assert all(record.task not in tasks for tasks in committed.values())
    named = {r.bundle for tasks in committed.values() for r in tasks.values()}
    assert {bundle.name for bundle in (target / "parts").iterdir()} == named
    victim.write_bytes(data)
    merge_stores(target, pair)
    check_union(target)


def test_a_damaged_teacher_file_is_named(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (pair[0] / "teacher" / "config.json").write_bytes(b"[]")
    with pytest.raises(CorruptionError, match="config"):
        merge_stores(tmp_path / "all", pair)


def test_another_teacher_is_refused_before_anything_is_written(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    other = FeatureStore.create(tmp_path / "other", identity(dtype="bfloat16")).path
    with pytest.raises(SpecMismatchError, match="dtype"):
        merge_stores(tmp_path / "all", [*pair, other])
    assert not (tmp_path / "all").exists()
    before = files_of(pair[0])
    with pytest.raises(SpecMismatchError, match="dtype"):
        merge_stores(pair[0], [pair[1], other])
    assert files_of(pair[0]) == before
    with pytest.raises(StoreNotFoundError):
        merge_stores(pair[0], [tmp_path / "nothing"])


@pytest.mark.parametrize("step", ["copy_checked", "sync_tree", "publish"])
@pytest.mark.parametrize("after", [0, 3, 30])
def test_killed_and_completed(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, after: int
) -> None:
    """A merge that stops dead anywhere, without tidying up, is completed by the same merge."""
    target, calls = tmp_path / "all", 0
    module = featurestore.maintenance.merge if step == "copy_checked" else featurestore.storage.local
    real = getattr(module, step)

    def dies(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls > after:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, step, dies)
        # A killed process does not remove what it has begun.
        patch.setattr(shutil, "rmtree", lambda *arguments, **options: None)
        patch.setattr(time, "sleep", lambda seconds: None)
        try:
            merge_stores(target, pair)
        except KeyboardInterrupt:
            assert calls > after
    merge_stores(target, pair)
    check_union(target)
