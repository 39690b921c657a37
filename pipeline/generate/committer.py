"""Encoding and writing beside the teacher: some threads, a bounded queue, commits in order, back-pressure.

Threads, not processes: an encoder is at zstd, hashes, files and NumPy on whole arrays for most of its time,
which release Python's lock, and a process would have to be handed each shard and be watched.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from distily.system.stopping import advise
from featurestore.format.kinds.table import kind_of
from featurestore.format.plan import Task
from featurestore.format.records import CommitRecord, RunCost
from featurestore.format.schema import GroupSpec, Sample
from featurestore.store import FeatureStore
from pipeline.engines.base import Captured
from pipeline.generate.bases import Bases
from pipeline.generate.finite import check_finite
from pipeline.progress import Reporter

SHARDS_PER_MANIFEST = 1024


class Publisher:
    """Publishes a manifest whenever `SHARDS_PER_MANIFEST` shards are committed.

    What no manifest lists is read by every publication and plan, and who opens the store meanwhile finds what
    the last manifest lists.
    """

    def __init__(self, store: FeatureStore) -> None:
        self._store, self._unlisted = store, 0

    def committed(self) -> None:
        """One more shard is."""
        self._unlisted += 1
        if self._unlisted == SHARDS_PER_MANIFEST:
            self._store.publish_manifest()
            self._unlisted = 0


class Committer:
    """Commits shards, in the order in which they come, while the teacher is at later ones. Whoever uses it
    publishes the last manifest; those of a long run are published here.

    `encoders` shards are in the making, one waits, and who brings another one waits too. What goes wrong is
    raised at the next `put` or at the end. size: bytes committed so far. `kept` of `total` positions were
    committed before; total is None where it is not known. cost: what the run has spent so far; each shard is
    committed with what it has spent since.
    """

    def __init__(
        self,
        store: FeatureStore,
        report: Reporter,
        kept: int,
        total: int | None,
        cost: RunCost,
        encoders: int = 1,
    ) -> None:
        self._cost, self._clock = cost, time.monotonic()
        self._kept, self._total = kept, total
        self._advise()
        self._store, self._report, self._encoders = store, report, encoders
        self._bases = Bases(store)
        self._encode = ThreadPoolExecutor(encoders, "encode")
        self._commit = ThreadPoolExecutor(1, "commit")
        self._pending: deque[Future[list[CommitRecord]]] = deque()
        self._publisher = Publisher(store)
        self.size = 0

    def put(
        self, task: Task, samples: Sequence[Sample], groups: Sequence[GroupSpec], captured: Sequence[Captured]
    ) -> None:
        """A shard that is captured: of each sample, in order, what it was captured as."""
        while len(self._pending) > self._encoders or (self._pending and self._pending[0].done()):
            self._take()
        clock, before = time.monotonic(), self._cost
        spent = before.capture_seconds + clock - self._clock
        self._cost = replace(before, tokens=before.tokens + task.rows, capture_seconds=round(spent, 3))
        self._clock = clock
        private = self._encode.submit(
            _encode, self._store, self._bases, task, samples, groups, captured, self._cost
        )
        self._pending.append(self._commit.submit(self._keep, task, groups, private))

    def _keep(
        self, task: Task, groups: Sequence[GroupSpec], private: Future[list[CommitRecord]]
    ) -> list[CommitRecord]:
        """On the committing thread."""
        self._store.commit(private.result())
        self._publisher.committed()
        return self._store.read_records(task, groups)

    def _take(self) -> None:
        records = self._pending[0].result()  # it stays there for `__exit__` if we are stopped while we wait
        self._pending.popleft()
        while self._bases.told:
            self._report.stage(self._bases.told.popleft())
        written = sum(record.size for record in records)
        self.size += written
        self._kept += records[-1].rows
        self._advise()
        self._report.committed(records[-1].rows, written)

    def _advise(self) -> None:
        advise_of(self._kept, self._total)

    def __enter__(self) -> Committer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            while kind is None and self._pending:
                self._take()
        finally:
            # What is in the making is finished even after an error: it may be the last that is kept.
            self._encode.shutdown(cancel_futures=kind is not None)
            self._commit.shutdown()
            self._kept += sum(_committed_rows(future) for future in self._pending)
            self._advise()


def advise_of(kept: int, total: int | None) -> None:
    """What a command that is stopped now has kept of its tokens; total: None where it is not known."""
    if kept:
        of = "" if total is None else f" of {total:,}"
        advise(f"{kept:,}{of} tokens are committed and kept, the same command resumes there")
    else:
        advise("nothing is committed yet, the same command starts again")


def _encode(
    store: FeatureStore,
    bases: Bases,
    task: Task,
    samples: Sequence[Sample],
    groups: Sequence[GroupSpec],
    captured: Sequence[Captured],
    cost: RunCost,
) -> list[CommitRecord]:
    features = {}
    for group in groups:
        given = [one[group] for one in captured]
        check_finite(group, given, samples, store.identity)
        encoded = zip(bases.encode(group, given), samples, strict=True)
        features[group] = [kind_of(group).keep(group, one, sample) for one, sample in encoded]
    return store.prepare_bundle(task, samples, features, cost)


def _committed_rows(future: Future[list[CommitRecord]]) -> int:
    """Rows of a shard that nobody has waited for; 0 where it did not get so far."""
    return 0 if future.exception() is not None else future.result()[-1].rows
