"""`distily-cache generate`: plan what is missing, run the teacher over it, commit shard by shard."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, cast

from distily.errors import DistilyError
from featurestore.format.schema import GroupSpec, TeacherIdentity
from featurestore.format.sidecar import part_file
from featurestore.store import FeatureStore
from pipeline.data import portions
from pipeline.data.cutting import Cut, MakePool, here
from pipeline.data.samples import LeftOut
from pipeline.data.selection import Selection, select
from pipeline.engines.registry import find_engine
from pipeline.errors import RequestError
from pipeline.generate import provenance
from pipeline.generate.cluster import Read, Silent, capture_on_ray, on_a_worker, ray_pool, shards_of
from pipeline.generate.parallel import capture_side_by_side, machine_shares
from pipeline.generate.passes import CaptureJob, Run, capture_here, new_run
from pipeline.generate.planning import Passes, PlannedPortion, Planner, shuffled, small_first
from pipeline.generate.precision import Precision
from pipeline.generate.sizing import settle
from pipeline.progress import Reporter
from pipeline.request.generate import GenerateRequest
from pipeline.request.target import (
    check_store_directory,
    create_store,
    existing_store,
    stored_dtype,
)
from pipeline.request.teacher import check_against_teacher, identity_of
from pipeline.teacher.checkpoint import Teacher, load_teacher, teacher_files, without_padding
from pipeline.teacher.tokenizer import check_kept_files, load_tokenizer
from pipeline.teacher.weights import PlannedPart, plan_sidecar
from pipeline.writing.plan import WritingPlan
from pipeline.writing.stage import Written, find_writer, plan_writing, start_writer, write_missing


@dataclass(frozen=True, kw_only=True)
class PreparedCapture:
    """A request that was checked and planned; no model is loaded and nothing is written yet.

    `first` is the first portion of the data set, planned, and `complete` says whether it is all of it; the
    portions behind it are read while the teacher runs. `store` is the one at --out, None where there is none
    yet. `sidecar`: the parts that it lacks. `precision` says why the request's compute type is what it is,
    `first_tokens` how many positions the first shard has, so that it is committed early.
    `writer` and `writing` are None unless texts are to be written; while some are missing, `plan` takes them
    as long as they may get: a forecast.
    """

    request: GenerateRequest
    teacher: Teacher
    identity: TeacherIdentity
    selection: Selection
    first: PlannedPortion
    complete: bool
    store: FeatureStore | None
    precision: Precision
    first_tokens: int
    sidecar: tuple[PlannedPart, ...] = ()
    writer: Teacher | None = None
    writing: WritingPlan | None = None

    @property
    def left_out(self) -> LeftOut:
        """What did not become a sample, of what was read of the data set."""
        return self.selection.tally.left_out

    @property
    def settled(self) -> Settled:
        """The request as it is run, for a process that prepares it again."""
        return self.request, self.precision, self.first_tokens

    @property
    def job(self) -> CaptureJob:
        """What a process needs to capture for it."""
        return CaptureJob(
            request=self.request, teacher=self.teacher, identity=self.identity, precision=self.precision
        )

    def progress(self, groups: tuple[GroupSpec, ...]) -> tuple[int, int | None]:
        """Positions that are there before a pass for these groups, and all; see `Pass`."""
        plan = self.first.plan
        if not self.complete:
            return plan.rows_total - plan.rows_to_do, self.estimated(plan.rows_total)
        missing = sum(work.task.rows for work in plan.work if work.groups == groups)
        return plan.rows_total - missing, plan.rows_total

    def estimated(self, count: int) -> int | None:
        """About how many there are in the whole data set of what the first portion has `count` of; None where
        it is not known how large the data set is.
        """
        if self.complete:
            return count
        share, limit = self.selection.first_share, self.request.num_samples
        samples = self.first.plan.samples_total
        if limit is not None and samples and (not share or limit < samples / share):
            return round(count * limit / samples)
        return round(count / share) if share else None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one `generate` did. Seconds are wall-clock; `tokens` counts captured positions. Bytes: `size` of
    their features, `sidecar_size` of the parts of the teacher's sidecar that were added.

    `writing` is None when the request writes no texts.
    """

    samples: int
    tokens: int
    size: int
    sidecar_size: int
    engine_seconds: float
    capture_seconds: float
    manifest: str
    left_out: LeftOut
    writing: Written | None = None


# A request with nothing left open, see `pipeline.generate.sizing.settle`.
Settled = tuple[GenerateRequest, Precision, int]


def prepare(
    request: GenerateRequest,
    report: Reporter,
    settled: Settled | None = None,
    pool: MakePool = here,
    portion_size: int | None = None,
) -> PreparedCapture:
    """Check the request against teacher, store and data, and plan the work.

    Args:
        settled: what a machine with the engines has made of the request; None: this machine is one.
        pool: what cuts the portions behind the first.
        portion_size: characters of a portion; None: the usual.

    Raises:
        RequestError: anything the user has to fix; nothing has been written.
        SpecMismatchError: the store belongs to another teacher, tokenizer or engine.
    """
    check_store_directory(request.out)
    teacher = load_teacher(request.teacher, request.trust_remote_code)
    tokenizer = load_tokenizer(teacher, request.trust_remote_code)
    check_kept_files(teacher, tokenizer, request.trust_remote_code)
    teacher = without_padding(teacher, tokenizer)
    check_against_teacher(request, teacher)
    if not request.ray:
        _check_device(request)
    writer = find_writer(request, teacher) if request.writing else None
    if settled is None:
        given = request, teacher, stored_dtype(request.out)
        settled = on_a_worker(request, settle, *given) if request.ray else settle(*given)
    request, precision, first_tokens = settled
    identity = identity_of(request, teacher, find_engine(request.engine).version())
    store = existing_store(request.out, identity)
    sidecar = plan_sidecar(teacher, request.final, request.relation_layers, request.trust_remote_code)
    planner = Planner(store, request.groups(teacher), request.shard_size)
    covered = planner.covers if writer is None else lambda wanted: False
    selection = select(request, teacher, tokenizer, report, covered, pool, portion_size)
    writing, cut, complete = None, selection.first, selection.complete
    if writer is not None and selection.prompt_tokens is not None:
        # Texts are written before anything is captured, and which ones depends on all prompts.
        prompts, complete = list(selection.all().samples.values()), True
        root = store.root if store else None
        writing = plan_writing(request, teacher, writer, prompts, selection.prompt_tokens, root)
        cut = Cut(wanted=writing.extents(), samples=writing.samples_by_id())
    return PreparedCapture(
        request=request,
        teacher=teacher,
        identity=identity,
        selection=selection,
        first=PlannedPortion(planner.plan(cut.wanted, first_tokens), cut.samples),
        complete=complete,
        store=store,
        precision=precision,
        first_tokens=first_tokens,
        sidecar=_lacking(store, sidecar),
        writer=writer,
        writing=writing,
    )


def _check_device(request: GenerateRequest) -> None:
    """RequestError for more engines than there are GPUs, or a share of a GPU's memory where there is none."""
    import torch

    if request.data_parallel > 1:
        machine_shares(request.data_parallel, request.tensor_parallel_size)
    if request.gpu_memory_utilization is not None and not torch.cuda.is_available():
        raise RequestError(
            f"--gpu-memory-utilization {request.gpu_memory_utilization}: there is no GPU here; leave it out "
            "(on a CPU the environment variable VLLM_CPU_KVCACHE_SPACE sets the GiB of vLLM's KV cache)"
        )


def execute(prepared: PreparedCapture, report: Reporter, verbose: bool = False) -> Outcome:
    """Write the texts that are missing, compute and commit what the plan lacks, publish the manifest.

    A kill at any point leaves a store that the same command completes.
    """
    request = prepared.request
    store = create_store(request.out, prepared.identity)
    began = datetime.now(UTC)
    prepared, written = _write(prepared, store, verbose, report)
    runs: list[Run] = []
    sidecar_size = 0
    samples, left_out = prepared.first.plan.samples_total, prepared.left_out
    if not (prepared.complete and prepared.first.plan.nothing_to_do) or prepared.sidecar:
        store.put_teacher_files(teacher_files(prepared.teacher))
        sidecar_size = _put_sidecar(store, prepared, report)
        runs, samples, left_out = _capture(prepared, store, report, verbose)
    outcome = Outcome(
        samples=samples,
        tokens=sum(run.cost.tokens for run in runs),
        size=sum(run.size for run in runs),
        sidecar_size=sidecar_size,
        engine_seconds=max((run.cost.engine_seconds for run in runs), default=0.0),
        capture_seconds=max((run.cost.capture_seconds for run in runs), default=0.0),
        manifest=store.publish_manifest().digest,
        left_out=left_out,
        writing=written,
    )
    if not (outcome.tokens or sidecar_size):
        # Nothing is told of a command that found all done.
        runs = [Run(new_run(), 0)] if written and written.new else []
    for number, run in enumerate(runs):
        own = replace(
            outcome,
            tokens=run.cost.tokens,
            size=run.size,
            engine_seconds=run.cost.engine_seconds,
            capture_seconds=run.cost.capture_seconds,
            writing=None if number else written,
        )
        template = prepared.selection.chat_template
        store.add_provenance(provenance.record(request, template, began, own, run.cost.id))
    return outcome


def _capture(
    prepared: PreparedCapture, store: FeatureStore, report: Reporter, verbose: bool
) -> tuple[list[Run], int, LeftOut]:
    """What each process captured, how many samples the request has, and what did not become one."""
    request, planned = prepared.request, _Planned(prepared, store, report)
    if request.ray:
        plan = prepared.first.plan
        progress = plan.rows_total - plan.rows_to_do, prepared.estimated(plan.rows_total)
        reader = partial(_read_on_ray, prepared.settled, portions.PORTION_SIZE)
        runs, read = capture_on_ray(prepared.job, store, reader, progress, report, verbose)
        return runs, read.samples, read.left_out
    side_by_side = request.data_parallel > 1
    ordered = small_first if side_by_side else shuffled
    passes = Passes(store, planned.portions, ordered, prepared.progress)
    if side_by_side and passes.begin(0):
        runs = capture_side_by_side(prepared.job, passes, report, verbose)
    else:
        runs = [capture_here(prepared.job, store, passes, report, verbose)]
    return runs, planned.samples, prepared.left_out


def _read_on_ray(settled: Settled, portion_size: int) -> Iterator[Any]:
    """The shards of a request, read in one of Ray's processes; at last a `Read`."""
    silent = cast(Reporter, Silent())
    try:
        prepared = prepare(settled[0], silent, settled, ray_pool, portion_size)
        store = create_store(prepared.request.out, prepared.identity)
        planned = _Planned(prepared, store, silent)
        yield from shards_of(Passes(store, planned.portions, small_first, prepared.progress))
        yield Read(samples=planned.samples, left_out=prepared.left_out)
    except DistilyError as error:
        yield Read(error=error)


class _Planned:
    """The portions of a request, planned against its store, which is told of new shards portion by portion.

    samples: of the portions that were read.
    """

    def __init__(self, prepared: PreparedCapture, store: FeatureStore, report: Reporter) -> None:
        self._prepared, self._store, self._report = prepared, store, report
        request = prepared.request
        self._planner = Planner(store, request.groups(prepared.teacher), request.shard_size)
        self.samples = prepared.first.plan.samples_total

    def portions(self) -> Iterator[PlannedPortion]:
        """From the first on, whenever it is called."""
        if self._prepared.complete:
            self._store.add_plan(self._prepared.first.plan.new_tasks)
            yield self._prepared.first
            return
        self.samples = 0
        first: int | None = self._prepared.first_tokens
        for cut in self._prepared.selection.cuts(self._planner.covers):
            plan = self._planner.plan(cut.wanted, first)
            if first is None:  # what is there of the first portion was counted when the pass began
                self._report.skip(plan.rows_total - plan.rows_to_do)
            first = None
            self._store.add_plan(plan.new_tasks)
            self.samples += plan.samples_total
            yield PlannedPortion(plan, cut.samples)


def _write(
    prepared: PreparedCapture, store: FeatureStore, verbose: bool, report: Reporter
) -> tuple[PreparedCapture, Written | None]:
    """Have all texts of the request written, and plan the samples that they make.

    The writer is closed before the teacher's engine starts, so that each has the whole memory.
    """
    request, model, texts = prepared.request, prepared.writer, prepared.writing
    if model is None or texts is None:
        return prepared, None

    start = partial(start_writer, request, model, texts.spec, verbose, report)
    texts, written = write_missing(texts, store.root, model.name, start, report)
    planner = Planner(store, request.groups(prepared.teacher), request.shard_size)
    plan = planner.plan(texts.extents(), prepared.first_tokens)
    first = PlannedPortion(plan, texts.samples_by_id())
    return replace(prepared, first=first, store=store, writing=texts), written


def _lacking(store: FeatureStore | None, parts: Sequence[PlannedPart]) -> tuple[PlannedPart, ...]:
    """The parts that the store does not list, or whose file is gone."""
    files = store.sidecar() if store else {}
    whole = {
        part
        for part, (name, (size, _)) in files.items()
        if store and store.root.size(f"teacher/{name}") == size
    }
    return tuple(part for part in parts if part.spec.part not in whole)


def _put_sidecar(store: FeatureStore, prepared: PreparedCapture, report: Reporter) -> int:
    """Copy the weights that the store lacks, one part at a time; returns their bytes."""
    written = 0
    for part in prepared.sidecar:
        report.stage(f"copying the teacher's {part.spec.part}")
        name, data = part_file(part.spec, part.read())
        store.put_teacher_files({name: data})
        written += len(data)
    return written
