"""SIGKILL at random moments of two racing writers loses nothing, and the same request completes the store."""

from __future__ import annotations

import multiprocessing
import random
import signal
import time
from pathlib import Path

from featurestore.identity import SAMPLES
from featurestore.reader import CacheReader
from featurestore.schema import group_id
from featurestore.store import FeatureStore
from featurestore.verify import verify_store
from tests.featurestore.helpers import assert_same, features, identity
from tests.featurestore.kill_writer import SPECS, complete, request

KILLS = 24


def test_killed_writers_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "store"
    spawn = multiprocessing.get_context("forkserver")
    spawn.set_forkserver_preload(["tests.featurestore.kill_writer"])
    chance = random.Random(7)
    committed: set[tuple[str, str]] = set()
    killed = 0
    for attempt in range(200):
        pair = [spawn.Process(target=complete, args=(path, backwards)) for backwards in (False, True)]
        for process in pair:
            process.start()
        time.sleep(chance.uniform(0.0, 0.15) + (0.5 if attempt == 0 else 0.0))
        for process in pair:
            process.kill()
            process.join()
        killed += sum(process.exitcode == -signal.SIGKILL for process in pair)
        if (path / "SPEC.json").exists():
            now = {(g, t) for g, records in FeatureStore.open(path).commits().items() for t in records}
            assert committed <= now, "a commit vanished"
            committed = now
        if killed >= KILLS:
            break
    assert killed >= KILLS

    complete(path)
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
