"""The store: what goes in comes out, the same request changes nothing, and another teacher is refused."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from featurestore.errors import (
    MissingFeatureError,
    SpecMismatchError,
    StoreFormatError,
    StoreNotFoundError,
)
from featurestore.format.plan import plan_generation
from featurestore.format.schema import GroupSpec, HiddenSpec, LogitsFeatures, LogitsSpec, LseSpec, group_id
from featurestore.reader import CacheReader
from featurestore.storage.local import LocalRoot
from featurestore.store import FeatureStore
from tests.featurestore.conftest import SPECS, Filled, Place, fill
from tests.featurestore.helpers import assert_same, features, hidden, identity, logits, sample, task_of
from tests.stores import lasting


def committed(store: FeatureStore) -> dict[str, set[str]]:
    return {group: set(records) for group, records in store.commits().items()}


@pytest.mark.parametrize(
    "spec",
    [
        LogitsSpec(1),
        LogitsSpec(512),
        LogitsSpec(64, 0.5),
        *(HiddenSpec(3, d) for d in ("bf16", "int8", "fp8", "int4", "int2", "f32")),
        LseSpec(0.05),
    ],
)
def test_every_kind_of_group_comes_back(place: Place, spec: GroupSpec) -> None:
    store = FeatureStore.create(place.at("s"), identity())
    samples = [sample(1, 1), sample(2, 700), sample(3, 33)]
    task = task_of(samples)
    store.add_plan([task])
    given = features(samples, [spec])
    records = store.write_bundle(task, samples, given)
    assert [r.group for r in records] == [group_id(spec), "samples"]
    manifest = store.publish_manifest()
    reader = CacheReader.open(place.at("s"), manifest.digest[:8])
    assert reader.sample_ids == list(task.sample_ids) and reader.lengths.tolist() == [1, 700, 33]
    for i, one in enumerate(samples):
        found = reader.read(i)
        assert found.id == one.id
        np.testing.assert_array_equal(found.tokens, one.tokens)
        np.testing.assert_array_equal(found.loss_mask, one.loss_mask)
        assert_same(found.features[spec], given[spec][i])


def test_a_store_of_a_wide_vocabulary(tmp_path: Path) -> None:
    store = FeatureStore.create(tmp_path / "s", identity(vocab_size=262_144))
    one, spec = sample(5, 9, 262_144), LogitsSpec(20)
    given = logits(one, spec, 262_144)
    store.add_plan([task_of([one])])
    store.write_bundle(task_of([one]), [one], {spec: [given]})
    store.publish_manifest()
    assert_same(CacheReader.open(tmp_path / "s").read(0).features[spec], given)


def test_known_tasks_samples_and_provenance_come_back(filled_anywhere: Filled) -> None:
    store = FeatureStore.open(filled_anywhere.path)
    assert store.identity == identity()
    assert store.known_tasks() == {t.id: t for t in filled_anywhere.tasks} and len(filled_anywhere.tasks) > 2
    for task in filled_anywhere.tasks:
        assert [s.id for s in store.read_samples(task.id)] == list(task.sample_ids)
    store.add_provenance({"argv": ["again"], "n": [1, None]})
    assert [r["argv"] for r in store.provenance()] == [["generate"], ["again"]]
    assert store.group_specs() == {group_id(s): s for s in SPECS}
    with pytest.raises(MissingFeatureError):
        store.read_samples("0" * 16)


def test_the_same_request_again_changes_no_file(filled_anywhere: Filled, place: Place) -> None:
    filled = filled_anywhere
    before = place.contents("store")
    store = FeatureStore.create(filled.path, identity(name="another/spelling"))
    wanted = [(s.id, len(s)) for s in filled.samples.values()]
    plan = plan_generation(
        known_tasks=store.known_tasks(),
        committed=committed(store),
        committed_specs=store.group_specs(),
        wanted=wanted,
        groups=SPECS,
        shard_tokens=90,
    )
    assert plan.nothing_to_do
    store.add_plan(filled.tasks)
    store.put_teacher_files({"config.json": b"{}", "tokenizer.json": b"[1]"})
    for task in filled.tasks:
        members = [filled.samples[s] for s in task.sample_ids]
        store.write_bundle(task, members, features(members, SPECS))
    store.publish_manifest()
    assert place.contents("store") == before


def test_extension_adds_files_and_the_old_manifest_reads_as_before(
    filled_anywhere: Filled, place: Place
) -> None:
    filled = filled_anywhere
    before = place.contents("store")
    old = CacheReader.open(filled.path)
    store, extra = filled.store, HiddenSpec(4, "fp8")
    wanted_samples = {**filled.samples, **{s.id: s for s in map(sample, range(100, 106))}}
    wanted = [(s.id, len(s)) for s in wanted_samples.values()]
    # Narrower logits than committed: served for old samples, computed for new ones.
    groups: list[GroupSpec] = [LogitsSpec(4, 0.5), extra]
    plan = plan_generation(
        known_tasks=store.known_tasks(),
        committed=committed(store),
        committed_specs=store.group_specs(),
        wanted=wanted,
        groups=groups,
        shard_tokens=90,
    )
    assert all(w.groups == (extra,) and not w.needs_samples for w in plan.work[: len(filled.tasks)])
    assert all(w.groups == tuple(groups) and w.needs_samples for w in plan.work[len(filled.tasks) :])
    store.add_plan(plan.new_tasks)
    for work in plan.work:
        members = [wanted_samples[s] for s in work.task.sample_ids]
        store.write_bundle(work.task, members, features(members, list(work.groups)))
    store.publish_manifest()

    after = place.contents("store")
    kept = lasting(before)
    assert {name: after[name] for name in kept} == kept
    new = CacheReader.open(filled.path)
    assert len(new) == len(wanted_samples) and len(old) == len(filled.samples)
    assert new.find("logits") == LogitsSpec(4, 0.5) and new.find("hidden.L4") == extra
    for reader in (old, CacheReader.open(filled.path, old.manifest_digest)):
        for i, sample_id in enumerate(reader.sample_ids):
            for spec, found in reader.read(i).features.items():
                assert_same(found, filled.given[sample_id][spec])
    for i, sample_id in enumerate(new.sample_ids):
        found = new.read(i, [LogitsSpec(4, 0.5)]).features[LogitsSpec(4, 0.5)]
        assert isinstance(found, LogitsFeatures) and int(found.counts.max()) <= 4
        exact = logits(wanted_samples[sample_id], LogitsSpec(4, 0.5))
        # The cut comes from logits within 1/64 nat: at most a few rows differ, by one rank.
        assert (found.counts != exact.counts).mean() < 0.2
    with pytest.raises(MissingFeatureError, match=r"only some samples have hidden\.L1"):
        new.find("hidden.L1")


def test_racing_writers_commit_once(place: Place) -> None:
    store = FeatureStore.create(place.at("s"), identity())
    samples = [sample(i) for i in range(6)]
    task = task_of(samples)
    given = features(samples, SPECS)
    start, results, errors = threading.Barrier(4), [], []

    def write() -> None:
        try:
            mine = FeatureStore.create(place.at("s"), identity())
            start.wait()
            mine.add_plan([task])
            results.append(mine.write_bundle(task, samples, given))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(results) == 4
    assert all(r == results[0] for r in results), "everyone is told the winner's record"
    assert {g: len(r) for g, r in store.commits().items()} == {
        **{group_id(s): 1 for s in SPECS},
        "samples": 1,
    }
    store.publish_manifest()
    for i in range(6):
        for spec, found in CacheReader.open(place.at("s")).read(i).features.items():
            assert_same(found, given[spec][i])


@pytest.mark.parametrize(
    ("field", "value", "flag"),
    [
        ("digest", "ff" * 16, "the same TEACHER (tiny)"),
        ("tokenizer_digest", "ee" * 16, "the same TEACHER (tiny)"),
        ("engine", "vllm", "--engine transformers"),
        ("dtype", "bfloat16", "--dtype float32"),
        ("quantization", "bitsandbytes", "neither --teacher-load-in-8bit"),
        ("vocab_size", 7, "the same TEACHER (tiny)"),
    ],
)
def test_another_teacher_is_refused_with_both_values(
    filled_anywhere: Filled, field: str, value: object, flag: str
) -> None:
    with pytest.raises(SpecMismatchError) as caught:
        FeatureStore.create(filled_anywhere.path, identity(**{field: value}))
    message = str(caught.value)
    assert field in message and repr(value) in message and repr(getattr(identity(), field)) in message
    assert f"give {flag}" in message and "another --out" in message
    assert "\n" not in message


def test_an_empty_store_takes_another_teacher(place: Place) -> None:
    old = FeatureStore.create(place.at("s"), identity())
    samples = [sample(1), sample(2)]
    old.add_plan([task_of(samples)])
    old.put_teacher_files({"tokenizer.json": b"old"})
    new = FeatureStore.create(place.at("s"), identity(dtype="bfloat16"))
    assert new.identity.dtype == FeatureStore.open(place.at("s")).identity.dtype == "bfloat16"
    assert new.known_tasks() == {}
    new.put_teacher_files({"tokenizer.json": b"new"})
    assert place.contents("s")["teacher/tokenizer.json"][1] == b"new"
    # A writer of before is at work still: what it brings is not committed under another teacher's name.
    with pytest.raises(SpecMismatchError, match="another --out"):
        old.write_bundle(task_of(samples), samples, {})
    assert new.is_empty()
    new.write_bundle(task_of(samples), samples, {})
    with pytest.raises(SpecMismatchError, match="give --dtype bfloat16"):
        FeatureStore.create(place.at("s"), identity())


def test_a_place_of_something_else_is_left_alone(place: Place) -> None:
    place.write("mine", "thesis.txt", b"mine")
    with pytest.raises(StoreFormatError, match="not empty"):
        FeatureStore.create(place.at("mine"), identity())
    assert list(place.contents("mine")) == ["thesis.txt"]
    for store in ("mine", "nowhere"):
        with pytest.raises(StoreNotFoundError):
            FeatureStore.open(place.at(store))
        with pytest.raises(StoreNotFoundError):
            CacheReader.open(place.at(store))


@pytest.mark.parametrize("look", ["exists", "names"])
def test_a_store_that_another_process_makes_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, look: str
) -> None:
    """Behind one look at the empty place, and before the other."""
    found = getattr(LocalRoot, look)

    def looked(root: LocalRoot, name: str) -> object:
        seen = found(root, name)
        monkeypatch.undo()
        FeatureStore.create(tmp_path / "store", identity()).put_teacher_files({"config.json": b"{}"})
        return seen

    monkeypatch.setattr(LocalRoot, look, looked)
    assert FeatureStore.create(tmp_path / "store", identity()).identity == identity()


def test_an_unfinished_store_says_how_to_finish_it(place: Place) -> None:
    store = FeatureStore.create(place.at("s"), identity())
    with pytest.raises(StoreFormatError, match="distily-cache generate"):
        CacheReader.open(place.at("s"))
    with pytest.raises(StoreFormatError, match="nothing is committed"):
        store.publish_manifest()


def test_wrong_numbers_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    store = FeatureStore.create(tmp_path / "s", identity())
    one, spec, layer = sample(1, 12), LogitsSpec(5), HiddenSpec(2, "int8")
    task, good = task_of([one]), logits(one, LogitsSpec(5))
    store.add_plan([task])

    def changed(**fields: np.ndarray) -> LogitsFeatures:
        return LogitsFeatures(**{**vars(good), **fields})

    nan = good.lse.copy()
    nan[3] = np.nan
    bad: list[tuple[GroupSpec, object, str]] = [
        (spec, changed(ids=good.ids + 1000), "vocabulary"),
        (spec, changed(lse=nan), "finite"),
        (spec, changed(label_logprob=good.lse), "label_logprob"),
        (spec, changed(logits=good.logits[::-1].copy()), "descend|exceeds"),
        (spec, changed(logits=good.logits + 99), "exceeds"),
        (spec, changed(ids=good.ids[:-1]), "ids"),
        (LogitsSpec(4), good, "head sizes"),
        (layer, hidden(one, HiddenSpec(2, "bf16")), "dtype"),
        (layer, hidden(one, layer, 17), "values"),
        (layer, good, "HiddenFeatures"),
        (HiddenSpec(5, "bf16"), hidden(one, HiddenSpec(5, "bf16")), "4 layers"),
    ]
    for given_spec, value, message in bad:
        with pytest.raises(ValueError, match=message):
            store.write_bundle(task, [one], {given_spec: [value]})  # type: ignore[list-item]
    with pytest.raises(ValueError, match="not the samples"):
        store.write_bundle(task, [sample(2, 12)], {})
    with pytest.raises(ValueError, match="2 samples for 1"):
        store.write_bundle(task, [one], {spec: [good, good]})
    assert not (tmp_path / "s" / "parts").exists() and not store.commits()


def test_a_sample_in_two_tasks_is_read_once(place: Place) -> None:
    filled = fill(place.at("s"), [LogitsSpec(3)], count=4)
    twice = task_of([filled.samples[filled.tasks[0].sample_ids[0]], sample(77)])
    members = [filled.samples[twice.sample_ids[0]], sample(77)]
    filled.store.add_plan([twice])
    filled.store.write_bundle(twice, members, features(members, [LogitsSpec(3)]))
    filled.store.publish_manifest()
    reader = CacheReader.open(place.at("s"))
    assert len(reader) == 5 == len(set(reader.sample_ids))
