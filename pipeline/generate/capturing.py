"""One pass over the tasks that lack something: samples to the engine, what it captures to the committer."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence

from featurestore.format.plan import Work
from featurestore.format.schema import Sample
from featurestore.store import FeatureStore
from pipeline.engines.base import Captured, Engine
from pipeline.generate.committer import Committer
from pipeline.generate.planning import Shard
from pipeline.progress import Reporter

Opened = tuple[Work, Sequence[Sample], Iterable[Captured]]


def capture_tasks(
    store: FeatureStore,
    engine: Engine | None,
    shards: Iterable[Shard],
    committer: Committer,
    report: Reporter,
) -> int:
    """Capture each task that nobody else has committed meanwhile, and hand it to the committer; returns the
    positions captured.

    engine: None where no task lacks more than its samples.
    """
    tokens = 0
    for work, members, captures in _opened(store, engine, shards, report):
        captured = []
        for sample, features in zip(members, captures, strict=True):
            captured.append(features)
            report.advance(len(sample))
        committer.put(work.task, members, work.groups, captured)
        tokens += work.task.rows
    return tokens


def _opened(
    store: FeatureStore, engine: Engine | None, shards: Iterable[Shard], report: Reporter
) -> Iterator[Opened]:
    """Each task that is not committed by now, its samples, and what captures them.

    The engine is given later tasks before the first is read to its end, as far ahead as it wants, so that it
    never has to wait between two of them.
    """
    # Engines of other packages need not have it.
    ahead = getattr(engine, "ahead", 0)
    opened: deque[Opened] = deque()
    for work, members in shards:
        if store.holds(work.task, work.groups):
            report.skip(work.task.rows)
            continue
        captures = engine.capture([sample.tokens for sample in members]) if engine else [{}] * len(members)
        opened.append((work, members, captures))
        while opened and sum(one.task.rows for one, _, _ in opened) - opened[0][0].task.rows >= ahead:
            yield opened.popleft()
    yield from opened
