"""`generate --ray [ADDRESS] --workers N`: one engine on each of N workers of a Ray cluster, on one store.

    read, cut, plan (one task) -> shards of samples -> actor pool, an engine each
        -> {task, rows, bytes, digest}

Ray Data moves the shards, holds back the reader when the engines are behind, and starts an actor anew that
died, with the shards that it had. It may capture a shard twice; what counts is the first commit record of it,
as everywhere. The reader is the one of a single machine, and tokenises in Ray's tasks, so the shards are the
same. Only the store, the teacher's path or name, and this package have to be there on every machine.
"""

from __future__ import annotations

import logging
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any, cast

from distily.errors import DistilyError
from distily.logs import show_on_stderr
from distily.system.command_line import quiet_libraries
from featurestore.format.plan import Work
from featurestore.format.records import RunCost
from featurestore.format.schema import GroupSpec, Sample
from featurestore.identity import digest
from featurestore.store import FeatureStore
from pipeline.data.cutting import Cut, Cutter, Cutting
from pipeline.data.samples import LeftOut
from pipeline.engines.base import Engine
from pipeline.errors import EngineError, PipelineError, RequestError
from pipeline.generate.committer import Publisher, advise_of
from pipeline.generate.passes import CaptureJob, Run, new_run, start_engine
from pipeline.generate.planning import Passes
from pipeline.progress import Reporter
from pipeline.request.generate import GenerateRequest
from pipeline.request.target import create_store
from pipeline.teacher.tokenizer import load_tokenizer

# Shards that an actor is at: one in the engine, one that is encoded and committed.
SHARDS_AT_ONCE = 2
# Portions that are tokenised ahead.
_MOST_PORTIONS_AHEAD = 32
# A column of objects, which Ray moves as they are.
_SHARD, _DONE = "shard", "done"
_TOKEN = (
    "where the cluster has a token, as Ray's own commands give it one, copy ~/.ray/auth_token from its first "
    "machine and set RAY_AUTH_MODE=token"
)
_ANSWER_SECONDS = 10.0


# Addresses that `connect` has connected to; a program of the user's may be connected itself.
_began_here: list[str] = []


def connect(address: str) -> ModuleType:
    """Ray, connected to a cluster: `auto` is the one that runs here, or a new one on this machine.

    Raises:
        RequestError: it is not installed, or no cluster answers.
    """
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise RequestError("--ray: Ray is not installed; install the extra [ray]") from error
    if not ray.is_initialized():
        _check_answers(address)
        _began_here.append(address)
        ours = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            ray.init(
                address=None if address == "auto" else address,
                include_dashboard=False if address == "local" else None,
                log_to_driver=False,
                logging_level="ERROR",
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            fix = f"; {_TOKEN}" if isinstance(error, ConnectionError) else ""
            raise RequestError(f"--ray {address}: {' '.join(str(error).split())}{fix}") from error
        if threading.current_thread() is threading.main_thread():
            for number, handler in ours.items():  # Ray has put its own in their place
                signal.signal(number, handler)
        logging.getLogger("ray.data").setLevel(logging.ERROR)
    return cast(ModuleType, ray)


def _check_answers(address: str) -> None:
    """RequestError where nothing listens at host:port, for which Ray itself waits eight minutes."""
    found = re.fullmatch(r"(?:ray://)?\[?(.+?)\]?:([0-9]{1,5})", address)
    if found is None:
        return
    try:
        socket.create_connection((found[1], int(found[2])), _ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RequestError(
            f"--ray {address}: nothing answers there ({reason}); give the address of a cluster's first "
            "machine, which `ray start --head` prints"
        ) from error


def on_a_worker(request: GenerateRequest, function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function gives on a machine that an engine may run on: the command's own may have no GPU.

    Without GPUs in the cluster that is any machine, so this one.
    """
    ray = connect(request.ray or "")
    resources = _engine_resources(ray, request)
    if not resources["num_gpus"]:
        return function(*arguments)
    return _answer(ray, ray.remote(function).options(**resources).remote(*arguments))


def _answer(ray: Any, reference: Any) -> Any:
    """What a task gives; the errors that are ours as they were raised."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, DistilyError):
            raise error.cause from None
        raise


def _engine_resources(ray: Any, request: GenerateRequest) -> dict[str, Any]:
    """What Ray gives an engine: GPUs where the cluster has some, else a core."""
    gpus = request.gpus_per_worker
    if gpus is None:
        gpus = request.tensor_parallel_size if ray.cluster_resources().get("GPU") else 0
    return {"num_cpus": 0 if gpus else 1, "num_gpus": gpus}


class RayPool:
    """Cuts portions in Ray's tasks, on any machine of the cluster; see `CuttingPool`."""

    def __init__(self, cutting: Cutting) -> None:
        ray = connect("auto")
        self._cut = ray.remote(_cut).options(num_cpus=0, max_retries=-1)
        self._cutting = ray.put(cutting)
        self.depth = min(max(int(ray.cluster_resources().get("CPU", 1)), 2), _MOST_PORTIONS_AHEAD)

    def submit(
        self, values: Sequence[tuple[str, Any]], limit: int | None = None, known: Container[str] = ()
    ) -> Future[Cut]:
        """Have a portion cut."""
        return cast("Future[Cut]", self._cut.remote(self._cutting, values, limit, known).future())

    def __enter__(self) -> RayPool:
        return self

    def __exit__(self, *_: object) -> None: ...


def ray_pool(cutting: Cutting, tokenizer: Any, engine_cores: int) -> RayPool:
    """The pool of a request in one of Ray's processes."""
    return RayPool(cutting)


_cutters: dict[Cutting, Cutter] = {}


def _cut(
    cutting: Cutting, values: Sequence[tuple[str, Any]], limit: int | None, known: Container[str]
) -> Cut:
    """In one of Ray's processes, which keeps the tokenizer for the next portion."""
    if cutting not in _cutters:
        quiet_libraries(quiet=True)
        tokenizer = load_tokenizer(cutting.teacher, cutting.trust_remote_code)
        _cutters[cutting] = Cutter(cutting, tokenizer)
    return _cutters[cutting].cut(values, limit, known)


@dataclass(frozen=True, kw_only=True)
class Read:
    """What the reader has to tell at its end: how many samples there are and what was left out, or the line
    that says why the data set cannot be used.
    """

    samples: int = 0
    left_out: LeftOut = field(default_factory=LeftOut)
    error: DistilyError | None = None


def _source(ray: Any, reader: Callable[[], Iterator[Any]]) -> Any:
    """A data set of one row for each thing that a reader gives, read by one task."""
    import pandas as pd
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    def blocks() -> Iterator[Any]:
        for one in reader():
            column = pd.Series([None], dtype=object)
            column[0] = one
            yield pd.DataFrame({_SHARD: column})

    class Shards(Datasource):  # type: ignore[misc]
        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, *_: Any, **__: Any) -> list[Any]:
            unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
            return [ReadTask(blocks, unknown)]

    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    return ray.data.read_datasource(Shards(), override_num_blocks=1, num_cpus=0, label_selector=here)


class CapturingActor:
    """An engine, and the store that it fills. Ray calls it in several threads: one has the engine, another
    encodes and commits what it has captured.
    """

    def __init__(self, job: CaptureJob, verbose: bool) -> None:
        quiet_libraries(not verbose)
        show_on_stderr("distily-cache")
        self._job, self._verbose = job, verbose
        self._store = create_store(job.request.out, job.identity)
        self._capturing = threading.Lock()
        self._engine: Engine | None = None
        self._groups: tuple[GroupSpec, ...] = ()
        self._cost = new_run()

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        done = [one if isinstance(one, Read) else self._capture(*one) for one in batch[_SHARD]]
        return {_DONE: done}

    def _capture(self, work: Work, samples: Sequence[Sample]) -> dict[str, Any]:
        task, store = work.task, self._store
        if store.holds(task, work.groups):
            return {"task": task.id, "rows": task.rows, "bytes": 0, "captured": False, "cost": self._cost}
        with self._capturing:
            engine = self._ready(work.groups)
            began = time.monotonic()
            found = (
                list(engine.capture([sample.tokens for sample in samples])) if engine else [{}] * len(samples)
            )
            spent = self._cost.capture_seconds + time.monotonic() - began
            self._cost = replace(
                self._cost, tokens=self._cost.tokens + task.rows, capture_seconds=round(spent, 3)
            )
            cost = self._cost
        features = {group: [one[group] for one in found] for group in work.groups}
        store.commit(store.prepare_bundle(task, samples, features, cost))
        records = store.read_records(task, work.groups)
        return {
            "task": task.id,
            "rows": task.rows,
            "bytes": sum(record.size for record in records),
            "digest": digest([record.to_bytes() for record in records]),
            "captured": True,
            "cost": cost,
        }

    def _ready(self, groups: tuple[GroupSpec, ...]) -> Engine | None:
        """An engine that captures these groups, None for none."""
        if groups != self._groups:
            if self._engine is not None:
                self._engine.close()
            began = time.monotonic()
            self._engine, self._groups = None, groups
            if groups:
                self._engine = start_engine(self._job, groups, self._verbose, cast(Reporter, Silent()))
            spent = self._cost.engine_seconds + time.monotonic() - began
            self._cost = replace(self._cost, engine_seconds=round(spent, 3))
        return self._engine


class Silent:
    """A Reporter that nobody listens to."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


def capture_on_ray(
    job: CaptureJob,
    store: FeatureStore,
    reader: Callable[[], Iterator[Any]],
    progress: tuple[int, int | None],
    report: Reporter,
    verbose: bool,
) -> tuple[list[Run], Read]:
    """Capture the shards that `reader` gives, which runs in one of Ray's processes on this machine.

    store: the one of the request, of which manifests are published meanwhile, but not the last. progress:
    positions that are there before, and about all.

    Returns:
        what each actor captured, and what the reader told at its end.

    Raises:
        EngineError: an engine, or Ray itself, failed.
        DistilyError: what an actor or the reader raised.
    """
    ray = connect(job.request.ray or "")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = 1  # every row is a block of its own
    context.execution_options.preserve_order = False
    actors = ray.data.ActorPoolStrategy(
        size=job.request.workers or 1,
        max_tasks_in_flight_per_actor=SHARDS_AT_ONCE + 1,
        max_concurrent_calls_per_actor=SHARDS_AT_ONCE,
    )
    done = _source(ray, reader).map_batches(
        CapturingActor,
        fn_constructor_args=(job, verbose),
        batch_size=None,
        batch_format="pandas",
        compute=actors,
        **_engine_resources(ray, job.request),
    )
    report.stage(f"starting {job.request.workers or 1} engines on Ray, {job.request.engine} in each")
    report.start(*progress)
    # Ray tells of its own on standard output, where a command's result belongs.
    with redirect_stdout(sys.stderr):
        try:
            return _listen(done, store, progress, report)
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, DistilyError):
                raise cause from None
            raise EngineError(f"Ray ended the capture: {' '.join(str(error).split())[:300]}") from error
        finally:
            if _began_here:
                # A cluster that began with the command ends with it, and so does what Ray has to tell.
                ray.shutdown()


def _listen(
    done: Any, store: FeatureStore, progress: tuple[int, int | None], report: Reporter
) -> tuple[list[Run], Read]:
    kept, total = progress
    publisher = Publisher(store)
    costs: dict[str, RunCost] = {}
    sizes: dict[str, int] = {}
    read = Read(error=PipelineError("the reader of the data set ended early; the same command resumes"))
    for batch in done.iter_batches(batch_size=None, batch_format="pandas", prefetch_batches=0):
        for one in batch[_DONE]:
            if isinstance(one, Read):
                read = one
                continue
            kept += one["rows"]
            advise_of(kept, total)
            if not one["captured"]:
                report.skip(one["rows"])
                continue
            cost = one["cost"]
            sizes[cost.id] = sizes.get(cost.id, 0) + one["bytes"]
            if cost.id not in costs or cost.tokens > costs[cost.id].tokens:
                costs[cost.id] = cost
            report.advance(one["rows"])
            report.committed(one["rows"], one["bytes"])
            publisher.committed()
    if read.error is not None:
        raise read.error
    return [Run(cost, sizes[name]) for name, cost in costs.items()], read


def shards_of(passes: Passes) -> Iterator[tuple[Work, Sequence[Sample]]]:
    """All shards, pass by pass."""
    number = 0
    while passes.begin(number) is not None:
        while (shard := passes.take(number)) is not None:
            yield shard
        number += 1
