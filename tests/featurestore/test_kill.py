"""SIGKILL at random moments of two racing writers loses nothing, and the same request completes the store."""

from __future__ import annotations

import contextlib
import multiprocessing
import random
import signal
import time
from pathlib import Path

from featurestore.format.schema import group_id
from featurestore.identity import SAMPLES
from featurestore.maintenance.gc import collect
from featurestore.maintenance.verify import verify_store
from featurestore.reader import CacheReader
from featurestore.store import FeatureStore
from tests.featurestore.helpers import assert_same, features, identity
from tests.featurestore.kill_writer import SPECS, complete, request

KILLS = 16


def run_and_kill(path: Path, bundles: int, seconds: float) -> int:
    """Start two writers in opposite orders and kill both `seconds` into their n-th bundle.

    Returns how many died of it. Counting bundles keeps the moment where it belongs on a slow machine.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tests.featurestore.kill_writer"])
    pipes = [server.Pipe(duplex=False) for _ in range(2)]
    pair = [server.Process(target=complete, args=(path, i == 1, pipes[i][1])) for i in range(2)]
    for process, (_, sender) in zip(pair, pipes, strict=True):
        process.start()
        sender.close()
    # A writer that has nothing left to do closes its end.
    with contextlib.suppress(EOFError):
        for _ in range(bundles):
            for receiver, _ in pipes:
                receiver.recv()
    time.sleep(seconds)
    for process in pair:
        process.kill()
        process.join()
    return sum(process.exitcode == -signal.SIGKILL for process in pair)


def bundles_of(path: Path) -> set[str]:
    """The bundles that are committed."""
    commits = FeatureStore.open(path).commits()
    return {record.bundle for records in commits.values() for record in records.values()}


def check_complete(path: Path) -> None:
    """Every row of the request is there once and is what went in."""
    tasks, samples = request()
    commits = FeatureStore.create(path, identity()).commits()
    assert {g: set(r) for g, r in commits.items()} == {
        g: {t.id for t in tasks} for g in (SAMPLES, *map(group_id, SPECS))
    }
    report = verify_store(path, deep=True)
    assert report.sound and report.rows == sum(t.rows for t in tasks)
    reader = CacheReader.open(path)
    assert sorted(reader.sample_ids) == sorted(samples)
    for i, sample_id in enumerate(reader.sample_ids):
        given = features([samples[sample_id]], SPECS)
        for spec, found in reader.read(i).features.items():
            assert_same(found, given[spec][0])


def test_killed_writers_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "store"
    chance = random.Random(7)
    committed: dict[tuple[str, str], str] = {}
    killed = 0
    while killed < KILLS:
        killed += run_and_kill(path, chance.randint(1, 2), chance.uniform(0.0, 0.06))
        if (path / "SPEC.json").exists():
            commits = FeatureStore.open(path).commits()
            now = {(g, t): r.bundle for g, records in commits.items() for t, r in records.items()}
            assert committed.items() <= now.items(), "a commit vanished or was replaced"
            committed = now
    orphans = {p.name for p in path.glob("parts/*")} - set(committed.values())
    assert len(orphans) >= KILLS // 4, "the kills have to hit bundles that are being written"

    complete(path)
    check_complete(path)
    found = collect(path, delete=True, min_age=0.0)
    assert {Path(orphan.path).name for orphan in found.orphans} >= orphans
    check_complete(path)
    assert {p.name for p in path.glob("parts/*")} == bundles_of(path)
