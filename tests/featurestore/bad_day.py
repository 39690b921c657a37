"""A store that is written and read while its object store has a bad day; what a test does once and
benchmarks/object_faults.py again and again.
"""

from __future__ import annotations

import random
import resource
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import TypeVar
from unittest.mock import patch

from featurestore.errors import FeatureStoreError
from featurestore.format.plan import split_tasks
from featurestore.maintenance.gc import collect
from featurestore.maintenance.verify import verify_store
from featurestore.store import FeatureStore
from tests.faults import LASTING, PASSING, FaultyProxy
from tests.featurestore.conftest import SMALL, read_everything
from tests.featurestore.helpers import features, identity, sample

T = TypeVar("T")
DISK_FULL = "full disk"
_LIMIT = 512  # bytes of the largest file on a disk that counts as full


@dataclass
class BadDay:
    """Says what is done to each request.

    share: of the requests that a fault of PASSING hits, the rarest kind so far. struck: how often each fault
    of LASTING began, and a disk was full; lines: what the refused operations said.
    """

    share: float
    seed: int = 0
    struck: Counter[str] = field(default_factory=Counter)
    lines: list[str] = field(default_factory=list)
    _lasting: str | None = None
    _chosen: Counter[str] = field(default_factory=Counter)
    _lock: Lock = field(default_factory=Lock)

    def __post_init__(self) -> None:
        self._chance = random.Random(self.seed)

    def choose(self, method: str, path: str) -> str | None:
        """For a `FaultyProxy`."""
        with self._lock:
            if self._lasting or self._chance.random() >= self.share:
                return self._lasting
            kinds = [kind for kind in PASSING if kind != "torn" or method == "GET"]
            kind = min(kinds, key=lambda kind: self._chosen[kind])
            self._chosen[kind] += 1
            return kind

    def strike(self, kind: str) -> None:
        """From now on every request is refused, until `persist` has seen it."""
        with self._lock:
            self._lasting = kind
            self.struck[kind] += 1

    def persist(self, operation: Callable[[], T]) -> T:
        """Run an operation again after each refusal, which is one line, as a user does who has mended what
        it names.
        """
        for _ in range(20):
            try:
                return operation()
            except FeatureStoreError as error:
                line = str(error)
                assert "\n" not in line and "Debug" not in line and len(line) < 400, line
                with self._lock:
                    self.lines.append(line)
                    self._lasting = None
        raise AssertionError(f"refused again and again: {self.lines[-3:]}")

    def on_a_full_disk(self, operation: Callable[[], object]) -> None:
        """It has to be refused in a line."""
        self.struck[DISK_FULL] += 1
        before = len(self.lines)
        try:
            with _full_disk():
                operation()
        except FeatureStoreError as error:
            self.lines.append(str(error))
        assert len(self.lines) > before and "\n" not in self.lines[-1], "a full disk went unnoticed"


@contextmanager
def _full_disk() -> Iterator[None]:
    """Python ignores SIGXFSZ, so that a write beyond the limit fails like one on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (_LIMIT, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write_and_read(
    url: str, endpoint: str, proxy: FaultyProxy, day: BadDay, mirrors: Path, seed: int, count: int
) -> None:
    """Two writers race through the proxy for `count` samples, a reader with an empty mirror follows; then the
    store is looked through without faults.

    Every fault of LASTING strikes, and the disk of one process is full while it writes and while it reads.
    """
    samples = {one.id: one for one in (sample(1000 * seed + i) for i in range(count))}
    tasks = split_tasks([(one.id, len(one)) for one in samples.values()], 60)
    members = {task.id: [samples[s] for s in task.sample_ids] for task in tasks}
    made = {task.id: features(members[task.id], SMALL) for task in tasks}
    given = {
        one.id: {spec: made[task][spec][i] for spec in SMALL}
        for task, ones in members.items()
        for i, one in enumerate(ones)
    }

    def write(order: slice) -> None:
        store = day.persist(lambda: FeatureStore.open(url))
        for task in tasks[order]:
            day.persist(lambda task=task: store.write_bundle(task, members[task.id], made[task.id]))

    with patch.dict("os.environ", {"AWS_ENDPOINT_URL": proxy.url}):
        store = day.persist(lambda: FeatureStore.create(url, identity()))
        day.persist(lambda: store.add_plan(tasks))
        first = tasks[0]
        day.on_a_full_disk(lambda: store.write_bundle(first, members[first.id], made[first.id]))
        day.strike("expired")
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(write, (slice(None), slice(None, None, -1))))
        day.strike("skewed")
        day.persist(lambda: store.add_provenance({"argv": ["generate"], "seconds": 1.5}))
        day.persist(store.publish_manifest)
        shutil.rmtree(mirrors)
        day.on_a_full_disk(lambda: read_everything(url, given))
        for kind in LASTING:
            day.strike(kind)
            day.persist(lambda: read_everything(url, given))

    with patch.dict("os.environ", {"AWS_ENDPOINT_URL": endpoint}):
        commits = FeatureStore.open(url).commits()
        assert all(set(records) == set(members) for records in commits.values()), "a commit is missing"
        assert verify_store(url, deep=True).sound
        collect(url, delete=True, min_age=0)
        assert collect(url).orphans == [] and verify_store(url, deep=True).sound
        shutil.rmtree(mirrors, ignore_errors=True)
        read_everything(url, given)
