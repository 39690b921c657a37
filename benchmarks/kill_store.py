"""SIGKILL two real generators that race on one store, 300 times, and look for what is lost.

Both run the whole of `generate` with the transformers engine on a tiny teacher and the default head, draws
and an int8 layer. Each is killed at a random moment up to 50 ms after one of its first shards. After each
pair of kills every commit that was there has to be there still, unchanged. In the end one more `generate`
completes the store; it is compared with the store of an undisturbed run to the last bit, and `gc` removes the
orphans.
"""

from __future__ import annotations

import dataclasses
import os
import random
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, table, write_result

os.environ["PYTHONPATH"] = str(ROOT)
sys.path.insert(0, str(ROOT))

from featurestore.maintenance.gc import collect
from featurestore.maintenance.verify import verify_store
from featurestore.store import FeatureStore
from tests import teachers
from tests.pipeline.racing import assert_equal_stores, generate, make_request, race_and_kill

KILLS = 300


def main() -> None:
    chance = random.Random(11)
    killed = stores = orphans = bundles = 0
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        teacher = teachers.llama(home / "teacher")
        undisturbed = make_request(teacher, home, home / "undisturbed")
        generate(undisturbed)
        wanted = set(FeatureStore.open(undisturbed.out).known_tasks())
        while killed < KILLS:
            stores += 1
            request = dataclasses.replace(undisturbed, out=str(home / f"store{stores}"))
            committed: dict[tuple[str, str], str] = {}
            while killed < KILLS and {t for g, t in committed if g == "samples"} != wanted:
                killed += race_and_kill(request, chance.randint(1, 3), chance.uniform(0.0, 0.05))
                commits = FeatureStore.open(request.out).commits()
                now = {(g, t): r.bundle for g, records in commits.items() for t, r in records.items()}
                assert committed.items() <= now.items(), "a commit vanished or was replaced"
                committed = now
                print(f"{killed} kills, store {stores}: {len(committed)} commits", flush=True)
            generate(request)
            assert_equal_stores(Path(request.out), Path(undisturbed.out))
            found = collect(request.out, delete=True, min_age=0.0)
            orphans += len(found.orphans)
            bundles += len(list((Path(request.out) / "parts").iterdir()))
            assert not collect(request.out).orphans and verify_store(request.out, deep=True).sound
            assert_equal_stores(Path(request.out), Path(undisturbed.out))
    lines = [
        ["SIGKILLs that hit a generator at work", f"{killed}"],
        ["stores brought to completion", f"{stores}"],
        ["bundles committed", f"{bundles}"],
        ["commits lost or replaced", "0"],
        ["rows missing, doubled or different from the undisturbed run", "0"],
        ["orphans removed by gc", f"{orphans}"],
        ["orphans left, problems found by verify --deep afterwards", "0"],
        ["seconds", f"{time.perf_counter() - start:.0f}"],
    ]
    intro = (__doc__ or "").split("\n", 2)[2].strip()
    write_result("kill_store", "Killing generators", f"{intro}\n\n{table(['', 'count'], lines)}")


if __name__ == "__main__":
    main()
