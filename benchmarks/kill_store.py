"""SIGKILL two generators that race on one store, 300 times, and look for what is lost.

The writers, the moments and the checks are those of tests/featurestore/test_kill.py: both work through the
same tasks from opposite ends and are killed inside a bundle. After each pair of kills every commit that was
there has to be there still, unchanged. In the end the same request completes the store, which is compared
row by row with what went in, and `gc` removes the orphans.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, table, write_result

sys.path.insert(0, str(ROOT))

from featurestore.gc import collect
from featurestore.store import FeatureStore
from featurestore.verify import verify_store
from tests.featurestore.kill_writer import complete, request
from tests.featurestore.test_kill import check_complete, run_and_kill

KILLS = 300


def main() -> None:
    chance = random.Random(11)
    killed = stores = orphans = bundles = 0
    start = time.perf_counter()
    while killed < KILLS:
        stores += 1
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "store"
            committed: dict[tuple[str, str], str] = {}
            tasks = {task.id for task in request()[0]}
            while killed < KILLS and {t for g, t in committed if g == "samples"} != tasks:
                killed += run_and_kill(path, chance.randint(1, 2), chance.uniform(0.0, 0.06))
                if (path / "SPEC.json").exists():
                    commits = FeatureStore.open(path).commits()
                    now = {(g, t): r.bundle for g, records in commits.items() for t, r in records.items()}
                    assert committed.items() <= now.items(), "a commit vanished or was replaced"
                    committed = now
            complete(path)
            check_complete(path)
            found = collect(path, delete=True, min_age=0.0)
            orphans += len(found.orphans)
            bundles += len(list((path / "parts").iterdir()))
            assert not collect(path).orphans and verify_store(path, deep=True).sound
    lines = [
        ["SIGKILLs that hit a writer at work", f"{killed}"],
        ["stores brought to completion", f"{stores}"],
        ["bundles committed", f"{bundles}"],
        ["commits lost or replaced", "0"],
        ["rows missing, doubled or different", "0"],
        ["orphans removed by gc", f"{orphans}"],
        ["orphans left, problems found by verify --deep afterwards", "0"],
        ["seconds", f"{time.perf_counter() - start:.0f}"],
    ]
    intro = (__doc__ or "").split("\n", 2)[2].strip()
    write_result("kill_store", "Killing writers", f"{intro}\n\n{table(['', 'count'], lines)}")


if __name__ == "__main__":
    main()
