"""SIGKILL two real generators that race on one store, 500 times, and look for what is lost.

    python -m benchmarks.kill_store

Both run the whole of `generate` with the transformers engine on a tiny teacher and the default head, draws
and an int8 layer. The data set is read in small portions, and each of them publishes a manifest after every
second shard, so that kills find them planning, claiming, writing, committing, folding segments and removing
markers. Each is killed at a random moment up to 50 ms after one of its first shards. After each pair of kills
every commit that was there has to be there still, unchanged, and what the newest manifest lists has to be
readable and to have all samples that the newest manifest before had. In the end one more `generate` completes
the store; it is compared with the store of an undisturbed run to the last bit, and `gc` removes the orphans.
"""

from __future__ import annotations

import dataclasses
import random
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.common import table, write_result
from featurestore.catalogue.manifest import head_names
from featurestore.maintenance.gc import collect
from featurestore.maintenance.verify import verify_store
from featurestore.reader import CacheReader
from featurestore.store import FeatureStore
from pipeline.data import portions
from pipeline.generate import committer
from pipeline.request.generate import GenerateRequest
from tests import teachers
from tests.pipeline.racing import assert_equal_stores, generate, make_request, race_and_kill

KILLS = 500
PORTION_SIZE, SHARDS_PER_MANIFEST = 600, 2


def run(request: GenerateRequest, pipe: Connection | None = None) -> None:
    """Fulfil the request in small portions with many manifests."""
    portions.PORTION_SIZE, committer.SHARDS_PER_MANIFEST = PORTION_SIZE, SHARDS_PER_MANIFEST
    generate(request, pipe)


def listed(store: FeatureStore) -> set[str]:
    """The samples of the newest manifest, each of which is read."""
    if not head_names(store.root):
        return set()
    reader = CacheReader.open(store.path)
    for index in range(len(reader)):
        reader.read(index)
    return set(reader.sample_ids)


def main() -> None:
    chance = random.Random(11)
    killed = stores = orphans = bundles = manifests = 0
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        teacher = teachers.llama(home / "teacher")
        undisturbed = make_request(teacher, home, home / "undisturbed")
        run(undisturbed)
        wanted = set(FeatureStore.open(undisturbed.out).known_tasks())
        while killed < KILLS:
            stores += 1
            request = dataclasses.replace(undisturbed, out=str(home / f"store{stores}"))
            committed: dict[tuple[str, str], str] = {}
            samples: set[str] = set()
            while killed < KILLS and {t for g, t in committed if g == "samples"} != wanted:
                killed += race_and_kill(request, chance.randint(1, 3), chance.uniform(0.0, 0.05), run)
                store = FeatureStore.open(request.out)
                commits = store.commits()
                now = {(g, t): r.bundle for g, records in commits.items() for t, r in records.items()}
                assert committed.items() <= now.items(), "a commit vanished or was replaced"
                committed = now
                now_listed = listed(store)
                assert samples <= now_listed, "the newest manifest has lost samples"
                samples = now_listed
                print(f"{killed} kills, store {stores}: {len(committed)} commits", flush=True)
            run(request)
            assert_equal_stores(Path(request.out), Path(undisturbed.out))
            found = collect(request.out, delete=True, min_age=0.0)
            orphans += len(found.orphans)
            manifests += len(list(Path(request.out).glob("MANIFEST-*.json")))
            bundles += len(list((Path(request.out) / "parts").iterdir()))
            assert not collect(request.out).orphans and verify_store(request.out, deep=True).sound
            assert_equal_stores(Path(request.out), Path(undisturbed.out))
    lines = [
        ["SIGKILLs that hit a generator at work", f"{killed}"],
        ["stores brought to completion", f"{stores}"],
        ["bundles committed", f"{bundles}"],
        ["manifests that are left of those that were published", f"{manifests}"],
        ["samples lost by a manifest", "0"],
        ["commits lost or replaced", "0"],
        ["rows missing, doubled or different from the undisturbed run", "0"],
        ["orphans removed by gc", f"{orphans}"],
        ["orphans left, problems found by verify --deep afterwards", "0"],
        ["seconds", f"{time.perf_counter() - start:.0f}"],
    ]
    intro = (__doc__ or "").split("\n", 4)[4].strip()
    body = f"{intro}\n\n{table(['', 'count'], lines)}"
    write_result("kill_store", "Killing generators", body, "python -m benchmarks.kill_store")


if __name__ == "__main__":
    main()
