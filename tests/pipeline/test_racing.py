"""Generators need no coordinator: they share the work, and kills at any moment lose nothing."""

from __future__ import annotations

import dataclasses
import multiprocessing
import random
from pathlib import Path

from featurestore.maintenance.gc import collect
from featurestore.maintenance.verify import verify_store
from featurestore.store import FeatureStore
from tests.pipeline.racing import assert_equal_stores, generate, make_request, race_and_kill

KILLS = 8


def test_killed_generators_lose_nothing(tiny_teacher: Path, tmp_path: Path) -> None:
    """A short run of benchmarks/kill_store.py."""
    request = make_request(tiny_teacher, tmp_path, tmp_path / "store")
    chance, killed = random.Random(3), 0
    committed: dict[tuple[str, str], str] = {}
    while killed < KILLS:
        killed += race_and_kill(request, chance.randint(1, 3), chance.uniform(0.0, 0.05))
        commits = FeatureStore.open(request.out).commits()
        now = {(g, t): r.bundle for g, records in commits.items() for t, r in records.items()}
        assert committed.items() <= now.items(), "a commit vanished or was replaced"
        committed = now
    generate(request)
    assert verify_store(request.out, deep=True).sound
    undisturbed = dataclasses.replace(request, out=str(tmp_path / "undisturbed"))
    generate(undisturbed)
    assert_equal_stores(request.out, undisturbed.out)
    collect(request.out, delete=True, min_age=0.0)
    assert not collect(request.out).orphans and verify_store(request.out, deep=True).sound
    assert_equal_stores(request.out, undisturbed.out)


def test_two_generators_share_the_work(tiny_teacher: Path, tmp_path: Path) -> None:
    """Both finish; together they compute little more than one alone would."""
    request = make_request(tiny_teacher, tmp_path, tmp_path / "store")
    context = multiprocessing.get_context("forkserver")
    pair = [context.Process(target=generate, args=(request,)) for _ in range(2)]
    for process in pair:
        process.start()
    for process in pair:
        process.join(240)
    assert [process.exitcode for process in pair] == [0, 0]
    store = FeatureStore.open(request.out)
    assert set(store.commits()["samples"]) == set(store.known_tasks())
    tokens = [record["tokens"] for record in store.provenance()]
    total = sum(task.rows for task in store.known_tasks().values())
    assert total <= sum(tokens) < 1.7 * total
