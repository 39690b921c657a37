"""Encoding and writing beside the teacher: one thread, a bounded queue, and back-pressure."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from distily.system.stopping import advise
from featurestore.format.plan import Task
from featurestore.format.records import CommitRecord, RunCost
from featurestore.format.schema import GroupFeatures, GroupSpec, Sample
from featurestore.store import FeatureStore
from pipeline.progress import Reporter


class Committer:
    """Commits shards in a thread while the teacher is at the next one.

    One shard is in the making, one waits, and who brings another one waits too. What goes wrong is raised at
    the next `put` or at the end. size: bytes committed so far. `kept` of `total` positions were committed
    before. cost: what the run has spent so far; each shard is committed with what it has spent since.
    """

    def __init__(self, store: FeatureStore, report: Reporter, kept: int, total: int, cost: RunCost) -> None:
        self._cost, self._clock = cost, time.monotonic()
        self._kept, self._total = kept, total
        self._advise()
        self._store, self._report = store, report
        self._thread = ThreadPoolExecutor(1, "commit")
        self._pending: deque[Future[list[CommitRecord]]] = deque()
        self.size = 0

    def put(
        self, task: Task, samples: Sequence[Sample], features: Mapping[GroupSpec, Sequence[GroupFeatures]]
    ) -> None:
        while len(self._pending) > 1 or (self._pending and self._pending[0].done()):
            self._take()
        clock, before = time.monotonic(), self._cost
        spent = before.capture_seconds + clock - self._clock
        self._cost = replace(before, tokens=before.tokens + task.rows, capture_seconds=round(spent, 3))
        self._clock = clock
        write = self._store.write_bundle
        self._pending.append(self._thread.submit(write, task, samples, features, self._cost))

    def _take(self) -> None:
        records = self._pending[0].result()  # it stays there for `__exit__` if we are stopped while we wait
        self._pending.popleft()
        written = sum(record.size for record in records)
        self.size += written
        self._kept += records[-1].rows
        self._advise()
        self._report.committed(records[-1].rows, written)

    def _advise(self) -> None:
        """What a command that is stopped now has kept."""
        if self._kept:
            kept = f"{self._kept:,} of {self._total:,} tokens are committed and kept"
            advise(f"{kept}, the same command resumes there")
        else:
            advise("nothing is committed yet, the same command starts again")

    def __enter__(self) -> Committer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            while kind is None and self._pending:
                self._take()
        finally:
            # What is in the making is finished even after an error: it may be the last that is kept.
            self._thread.shutdown(cancel_futures=kind is not None)
            self._kept += sum(_committed_rows(future) for future in self._pending)
            self._advise()


def _committed_rows(future: Future[list[CommitRecord]]) -> int:
    """Rows of a shard that nobody has waited for; 0 where it did not get so far."""
    if future.cancelled() or future.exception() is not None:
        return 0
    return future.result()[-1].rows
