"""What a plan lacks, captured by this process: an engine for each combination of column groups in turn."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from featurestore.format.records import RunCost
from featurestore.format.schema import GroupSpec, TeacherIdentity
from featurestore.store import FeatureStore
from pipeline.engines.base import Engine
from pipeline.engines.registry import find_engine
from pipeline.generate.capturing import capture_tasks
from pipeline.generate.committer import Committer
from pipeline.generate.planning import Pass, Shard
from pipeline.generate.precision import Precision
from pipeline.generate.sizing import encoders
from pipeline.progress import Reporter
from pipeline.request.generate import GenerateRequest
from pipeline.request.teacher import engine_config
from pipeline.teacher.checkpoint import Teacher


class Source(Protocol):
    """Gives out shards, as `pipeline.generate.planning.Passes` does."""

    def begin(self, number: int) -> Pass | None: ...
    def take(self, number: int) -> Shard | None: ...


@dataclass(frozen=True, kw_only=True)
class CaptureJob:
    """What a process captures with, on this machine or another. `precision` says why the request's compute
    type is what it is.
    """

    request: GenerateRequest
    teacher: Teacher
    identity: TeacherIdentity
    precision: Precision


@dataclass(frozen=True)
class Run:
    """What one process captured. cost: its id is that of its commit records. size: bytes."""

    cost: RunCost
    size: int


def new_run() -> RunCost:
    """Nothing spent yet."""
    return RunCost(id=secrets.token_hex(8))


def capture_here(
    job: CaptureJob,
    store: FeatureStore,
    source: Source,
    report: Reporter,
    verbose: bool,
) -> Run:
    """Capture and commit the shards that `source` gives out."""
    cost, size, number = new_run(), 0, 0
    engine: Engine | None = None
    groups: tuple[GroupSpec, ...] = ()
    try:
        while (found := source.begin(number)) is not None:
            clock = time.monotonic()
            if found.groups != groups:
                if engine is not None:
                    engine.close()
                engine, groups = None, found.groups
                engine = start_engine(job, groups, verbose, report) if groups else None
            ready = cost.engine_seconds + time.monotonic() - clock
            cost = replace(cost, engine_seconds=round(ready, 3))
            clock = time.monotonic()
            report.start(found.kept, found.total)
            threads = encoders(job.request.tensor_parallel_size, job.request.data_parallel)
            shards: Iterator[Shard] = iter(partial(source.take, number), None)
            with Committer(store, report, found.kept, found.total, cost, threads) as committer:
                tokens = capture_tasks(store, engine, shards, committer, report)
            spent = cost.capture_seconds + time.monotonic() - clock
            cost = replace(cost, tokens=cost.tokens + tokens, capture_seconds=round(spent, 3))
            size, number = size + committer.size, number + 1
    finally:
        if engine is not None:
            engine.close()
    return Run(cost, size)


def start_engine(job: CaptureJob, groups: tuple[GroupSpec, ...], verbose: bool, report: Reporter) -> Engine:
    """Load the teacher in the engine asked for, set to capture `groups`."""
    request, teacher = job.request, job.teacher
    dtype, quantize_to = request.torch_dtype(teacher), request.quantize_to(teacher)
    config = engine_config(request, teacher, dtype, groups, quantize_to)
    reason = job.precision.reason
    report.stage(
        f"starting {request.engine} with {teacher.architecture} in {dtype}" + f" ({reason})" * bool(reason)
    )
    return find_engine(request.engine).start(config, verbose)
