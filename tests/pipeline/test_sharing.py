"""Commands that share a store: which shards each leaves to the others, and for how long."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from featurestore.format.plan import Work
from featurestore.format.schema import GroupSpec, LogitsSpec
from featurestore.maintenance.gc import collect
from featurestore.store import FeatureStore
from pipeline.cli import app
from pipeline.cli.spelling import spelled
from pipeline.generate import claims
from pipeline.generate.claims import Claims
from pipeline.generate.planning import Passes, PlannedPortion, Planner, small_first
from tests.featurestore.helpers import features, identity, sample, task_of

GROUPS: tuple[GroupSpec, ...] = (LogitsSpec(6, 0.9, 4),)
SAMPLES = [sample(number, 30) for number in range(12)]


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    return FeatureStore.create(tmp_path / "store", identity())


def passes(store: FeatureStore) -> Passes:
    """Three portions of four samples, two to a shard."""
    planner = Planner(store, GROUPS, 60)

    def portions():  # type: ignore[no-untyped-def]
        for start in range(0, 12, 4):
            part = SAMPLES[start : start + 4]
            plan = planner.plan([(one.id, 30) for one in part])
            store.add_plan(plan.new_tasks)
            yield PlannedPortion(plan, {one.id: one for one in part})

    return Passes(store, portions, small_first, lambda groups: (0, None))


def commit(store: FeatureStore, work: Work) -> None:
    by_id = {one.id: one for one in SAMPLES}
    members = [by_id[name] for name in work.task.sample_ids]
    store.write_bundle(work.task, members, features(members, list(GROUPS)))


def everything(given: Passes, number: int) -> Sequence[Work]:
    return [shard[0] for shard in iter(lambda: given.take(number), None)]


def test_two_commands_share_the_shards(store: FeatureStore) -> None:
    one, two = passes(store), passes(store)
    assert one.begin(0) and two.begin(0)  # each has claimed its first shard
    first = one.take(0)
    others = everything(two, 0)
    mine = [first[0], *everything(one, 0)] if first else []
    taken = [work.task.id for work in (*mine, *others)]
    assert len(taken) == len(set(taken)) == 6 and len(mine) == 1
    for work in others:
        commit(store, work)
    commit(store, mine[0])
    # All is committed, so nobody waits; who captures leaves out what is there.
    assert one.begin(1) and {work.task.id for work in everything(one, 1)} == {w.task.id for w in others}
    assert two.begin(1) and {work.task.id for work in everything(two, 1)} == {mine[0].task.id}
    assert one.begin(2) is None and two.begin(2) is None
    assert store.root.names("claims") == []
    assert passes(store).begin(0) is None


def test_a_claim_of_a_killed_command_is_waited_for_and_then_overtaken(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Work(task_of(SAMPLES[:2]), GROUPS, True)
    assert Claims(store).take(work)  # and it is never heard of again
    mine = Claims(store)
    assert not mine.take(work)
    began = time.monotonic()
    mine.wait(work)
    assert time.monotonic() - began >= 0.9  # patience is a second at least, and the claim is just made
    monkeypatch.setattr(claims, "_FRESH_SECONDS", 0.0)
    assert mine.take(work)
    assert [orphan.path for orphan in collect(store.path).orphans] == [f"claims/{work.task.id}"]
    mine.release()
    assert collect(store.path).orphans == []


def test_a_claim_of_a_command_of_this_machine_ends_with_it(store: FeatureStore) -> None:
    work, other = (Work(task_of(SAMPLES[start : start + 2]), GROUPS, True) for start in (0, 2))
    child = multiprocessing.get_context("fork").Process(
        target=lambda: [Claims(store).take(one) for one in (work, other)]
    )
    child.start()
    child.join()
    assert sorted(store.root.names("claims")) == sorted((work.task.id, other.task.id))
    mine = Claims(store)
    assert mine.take(work)
    began = time.monotonic()
    mine.wait(other)
    assert time.monotonic() - began < 0.9  # which is what a claim of a living one would be given


def test_a_flag_may_stand_without_its_value() -> None:
    import typer

    group = typer.main.get_command(app)
    for words, expected in (
        (["--ray"], ["--ray=auto"]),
        (["--ray", "--workers", "2"], ["--ray=auto", "--workers", "2"]),
        (["--ray", "host:1"], ["--ray", "host:1"]),
        (["--ray=host:1"], ["--ray=host:1"]),
    ):
        assert spelled(["generate", *words], group) == ["generate", *expected]
