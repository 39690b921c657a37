"""What a plan lacks, captured by this process: an engine for each combination of column groups in turn."""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING

from featurestore.format.plan import Work
from featurestore.format.records import RunCost
from featurestore.format.schema import GroupSpec
from featurestore.store import FeatureStore
from pipeline.engines.base import Engine
from pipeline.engines.registry import find_engine
from pipeline.generate.capturing import capture_tasks
from pipeline.generate.committer import Committer
from pipeline.generate.sizing import encoders
from pipeline.progress import Reporter
from pipeline.request.teacher import engine_config

if TYPE_CHECKING:
    from pipeline.generate.run import PreparedCapture

# A shard is taken first when it is so many times smaller than the largest.
_EARLY = 2

# Number of a pass -> number of the next task of it that no other process has taken.
Take = Callable[[int], int]


@dataclass(frozen=True)
class Run:
    """What one process captured. cost: its id is that of its commit records. size: bytes."""

    cost: RunCost
    size: int


def new_run() -> RunCost:
    """Nothing spent yet."""
    return RunCost(id=secrets.token_hex(8))


def capture_here(
    prepared: PreparedCapture,
    store: FeatureStore,
    report: Reporter,
    verbose: bool,
    take: Take | None = None,
) -> Run:
    """Capture and commit what the plan lacks. Where several processes share it, `take` gives out the tasks;
    without it each process goes its own way, see `_shuffled`.
    """
    cost, size = new_run(), 0
    # Usually all work lacks the same groups; a store that was extended may need a pass per combination.
    by_groups = sorted(prepared.plan.work, key=lambda work: repr(work.groups))
    for number, (groups, group) in enumerate(groupby(by_groups, key=lambda work: work.groups)):
        works = list(group)
        clock = time.monotonic()
        engine = start_engine(prepared, groups, verbose, report) if groups else None
        ready = cost.engine_seconds + time.monotonic() - clock
        cost = replace(cost, engine_seconds=round(ready, 3))
        clock = time.monotonic()
        total = prepared.plan.rows_total
        kept = total - sum(work.task.rows for work in works)
        report.start(kept, total)
        threads = encoders(prepared.request.tensor_parallel_size, prepared.request.data_parallel)
        order = _shuffled(works) if take is None else _given_out(works, number, take)
        try:
            with Committer(store, report, kept, total, cost, threads) as committer:
                tokens = capture_tasks(store, engine, order, prepared.samples, committer, report)
        finally:
            if engine is not None:
                engine.close()
        spent = cost.capture_seconds + time.monotonic() - clock
        cost = replace(cost, tokens=cost.tokens + tokens, capture_seconds=round(spent, 3))
        size += committer.size
    return Run(cost, size)


def start_engine(
    prepared: PreparedCapture, groups: tuple[GroupSpec, ...], verbose: bool, report: Reporter
) -> Engine:
    """Load the teacher in the engine asked for, set to capture `groups`."""
    request, teacher = prepared.request, prepared.teacher
    dtype, quantize_to = request.torch_dtype(teacher), request.quantize_to(teacher)
    config = engine_config(request, teacher, dtype, groups, quantize_to)
    reason = prepared.precision.reason
    report.stage(
        f"starting {request.engine} with {teacher.architecture} in {dtype}" + f" ({reason})" * bool(reason)
    )
    return find_engine(request.engine).start(config, verbose)


def _shuffled(works: Sequence[Work]) -> list[Work]:
    """Several commands may be at work on the same tasks. Each takes them in an order of its own and leaves
    out what another has committed meanwhile, so they share the work and meet at its end only. A shard that
    was planned small, to be committed early, comes first.
    """
    return _small_first(random.SystemRandom().sample(works, len(works)))


def _given_out(works: Sequence[Work], number: int, take: Take) -> Iterator[Work]:
    listed = _small_first(works)
    while (place := take(number)) < len(listed):
        yield listed[place]


def _small_first(works: Sequence[Work]) -> list[Work]:
    largest = max(work.task.rows for work in works)
    return sorted(works, key=lambda work: work.task.rows * _EARLY > largest)
