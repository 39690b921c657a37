"""`distily-cache generate`: plan what is missing, run the teacher over it, commit shard by shard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial

from featurestore.format.plan import GenerationPlan
from featurestore.format.schema import Sample, TeacherIdentity
from featurestore.format.sidecar import part_file
from featurestore.store import FeatureStore
from pipeline.data.samples import LeftOut
from pipeline.data.selection import select
from pipeline.engines.registry import find_engine
from pipeline.errors import RequestError
from pipeline.generate import provenance
from pipeline.generate.parallel import capture_side_by_side, machine_shares
from pipeline.generate.passes import capture_here, new_run
from pipeline.generate.precision import Precision
from pipeline.generate.sizing import settle
from pipeline.progress import Reporter
from pipeline.request.generate import GenerateRequest
from pipeline.request.target import (
    check_store_directory,
    create_store,
    existing_store,
    plan_missing,
    stored_dtype,
)
from pipeline.request.teacher import check_against_teacher, identity_of
from pipeline.teacher.checkpoint import Teacher, load_teacher, teacher_files, without_padding
from pipeline.teacher.tokenizer import check_kept_files, load_tokenizer
from pipeline.teacher.weights import PlannedPart, plan_sidecar
from pipeline.writing.plan import WritingPlan
from pipeline.writing.stage import Written, find_writer, plan_writing, start_writer, write_missing


@dataclass(frozen=True)
class PreparedCapture:
    """A request that was checked and planned; no model is loaded and nothing is written yet.

    `store` is the one at --out, None where there is none yet. `sidecar`: the parts that it lacks.
    `chat_template` is the text of --chat-template. `precision` says why the request's compute type is what it
    is, `first_tokens` how many positions the first shard has, so that it is committed early.
    `writer` and `writing` are None unless texts are to be written; while some are missing, `plan` takes them
    as long as they may get: a forecast.
    """

    request: GenerateRequest
    teacher: Teacher
    identity: TeacherIdentity
    samples: dict[str, Sample]
    plan: GenerationPlan
    store: FeatureStore | None
    precision: Precision
    first_tokens: int
    sidecar: tuple[PlannedPart, ...] = ()
    left_out: LeftOut = field(default_factory=LeftOut)
    chat_template: str | None = None
    writer: Teacher | None = None
    writing: WritingPlan | None = None


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


def prepare(request: GenerateRequest, report: Reporter) -> PreparedCapture:
    """Check the request against teacher, store and data, and plan the work.

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
    _check_device(request)
    writer = find_writer(request, teacher) if request.writing else None
    request, precision, first_tokens = settle(request, teacher, stored_dtype(request.out))
    identity = identity_of(request, teacher, find_engine(request.engine).version())
    store = existing_store(request.out, identity)
    sidecar = plan_sidecar(teacher, request.final, request.relation_layers, request.trust_remote_code)
    groups = request.groups(teacher)

    def covered(wanted: Sequence[tuple[str, int]]) -> bool:
        return store is not None and plan_missing(store, wanted, groups, request.shard_size).nothing_to_do

    selection = select(request, teacher, tokenizer, report, covered)
    samples, writing = {sample.id: sample for sample in selection.samples}, None
    wanted = list(selection.wanted)
    if writer is not None:
        writing = plan_writing(request, teacher, writer, selection, store.root if store else None)
        samples, wanted = writing.samples_by_id(), writing.extents()
    return PreparedCapture(
        request=request,
        teacher=teacher,
        identity=identity,
        samples=samples,
        plan=plan_missing(store, wanted, groups, request.shard_size, first_tokens),
        store=store,
        precision=precision,
        first_tokens=first_tokens,
        sidecar=_lacking(store, sidecar),
        left_out=selection.left_out,
        chat_template=selection.chat_template,
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
    request, left_out = prepared.request, prepared.left_out
    store = create_store(request.out, prepared.identity)
    began = datetime.now(UTC)
    prepared, written = _write(prepared, store, verbose, report)
    plan = prepared.plan
    if plan.nothing_to_do and not prepared.sidecar:
        manifest = store.publish_manifest().digest
        outcome = Outcome(
            samples=plan.samples_total,
            tokens=0,
            size=0,
            sidecar_size=0,
            engine_seconds=0.0,
            capture_seconds=0.0,
            manifest=manifest,
            left_out=left_out,
            writing=written,
        )
        if written and written.new:
            store.add_provenance(
                provenance.record(request, prepared.chat_template, began, outcome, new_run().id)
            )
        return outcome
    store.put_teacher_files(teacher_files(prepared.teacher))
    sidecar_size = _put_sidecar(store, prepared, report)
    store.add_plan(plan.new_tasks)
    if request.data_parallel > 1 and plan.work:
        runs = capture_side_by_side(prepared, report, verbose)
    else:
        runs = [capture_here(prepared, store, report, verbose)]
    outcome = Outcome(
        samples=plan.samples_total,
        tokens=sum(run.cost.tokens for run in runs),
        size=sum(run.size for run in runs),
        sidecar_size=sidecar_size,
        engine_seconds=max(run.cost.engine_seconds for run in runs),
        capture_seconds=max(run.cost.capture_seconds for run in runs),
        manifest=store.publish_manifest().digest,
        left_out=left_out,
        writing=written,
    )
    for number, run in enumerate(runs):
        own = replace(
            outcome,
            tokens=run.cost.tokens,
            size=run.size,
            engine_seconds=run.cost.engine_seconds,
            capture_seconds=run.cost.capture_seconds,
            writing=None if number else written,
        )
        store.add_provenance(provenance.record(request, prepared.chat_template, began, own, run.cost.id))
    return outcome


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
    groups, first = request.groups(prepared.teacher), prepared.first_tokens
    plan = plan_missing(store, texts.extents(), groups, request.shard_size, first)
    return replace(prepared, samples=texts.samples_by_id(), plan=plan, store=store, writing=texts), written


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
