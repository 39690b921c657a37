"""`distily-cache generate`: plan what is missing, run the teacher over it, commit shard by shard."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby

from featurestore.directory import SPEC_FILE
from featurestore.errors import StoreWriteError
from featurestore.plan import GenerationPlan, Task, Work, plan_generation
from featurestore.root import root_of
from featurestore.schema import GroupFeatures, GroupSpec, Sample, TeacherIdentity
from featurestore.sidecar import part_file
from featurestore.store import FeatureStore
from pipeline import provenance
from pipeline.commit import Committer
from pipeline.engines.base import Engine, EngineConfig
from pipeline.errors import RequestError
from pipeline.progress import Reporter
from pipeline.request import GenerateRequest, check_against_teacher, check_store_directory, identity_of
from pipeline.samples import make_samples
from pipeline.sidecar import PlannedPart, plan_sidecar
from pipeline.teacher import Teacher, load_teacher, load_tokenizer, teacher_files
from pipeline.texts import load_documents


@dataclass(frozen=True)
class Prepared:
    """A request that was checked and planned; no model is loaded and nothing is written yet.

    `store` is the one at --out, None where there is none yet. `sidecar`: the parts that it lacks.
    """

    request: GenerateRequest
    teacher: Teacher
    identity: TeacherIdentity
    samples: dict[str, Sample]
    plan: GenerationPlan
    store: FeatureStore | None
    sidecar: tuple[PlannedPart, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What one `generate` did. Seconds are wall-clock; `tokens` counts captured positions. Bytes: `size` of
    their features, `sidecar_size` of the parts of the teacher's sidecar that were added.
    """

    samples: int
    tokens: int
    size: int
    sidecar_size: int
    engine_seconds: float
    capture_seconds: float
    manifest: str


def prepare(request: GenerateRequest, report: Reporter) -> Prepared:
    """Check the request against teacher, store and data, and plan the work.

    Raises:
        RequestError: anything the user has to mend; nothing has been written.
        SpecMismatchError: the store belongs to another teacher, tokenizer or engine.
    """
    check_store_directory(request.out)
    teacher = load_teacher(request.teacher, request.trust_remote_code)
    check_against_teacher(request, teacher)
    identity = identity_of(request, teacher, engine_version(request))
    store = _existing(request, identity)
    sidecar = plan_sidecar(teacher, request.final, request.relation_layers, request.trust_remote_code)
    documents = load_documents(request.dataset, request.split, request.text_column, request.dataset_config)
    report.stage(f"tokenising {request.dataset}")
    samples = make_samples(
        documents,
        load_tokenizer(teacher, request.trust_remote_code),
        max_seq_len=request.sequence_length(teacher),
        vocab_size=teacher.vocab_size,
        pack=request.pack,
        num_samples=request.num_samples,
    )
    commits = store.commits() if store else {}
    plan = plan_generation(
        known_tasks=store.known_tasks() if store else {},
        committed={group: set(tasks) for group, tasks in commits.items()},
        committed_specs=store.group_specs() if store else {},
        wanted=[(sample.id, len(sample)) for sample in samples],
        groups=request.groups(teacher),
        shard_tokens=request.shard_tokens,
    )
    by_id = {sample.id: sample for sample in samples}
    return Prepared(request, teacher, identity, by_id, plan, store, _lacking(store, sidecar))


def execute(prepared: Prepared, report: Reporter, verbose: bool = False) -> Outcome:
    """Compute and commit what the plan lacks, then publish the manifest.

    A kill at any point leaves a store that the same command completes.
    """
    request, plan = prepared.request, prepared.plan
    try:
        store = FeatureStore.create(request.out, prepared.identity)
    except StoreWriteError as error:
        raise RequestError(f"--out {request.out}: {error}") from error
    if plan.nothing_to_do and not prepared.sidecar:
        return Outcome(plan.samples_total, 0, 0, 0, 0.0, 0.0, store.publish_manifest().digest)
    began = datetime.now(UTC)
    store.put_teacher_files(teacher_files(prepared.teacher))
    sidecar_size = _put_sidecar(store, prepared, report)
    store.add_plan(plan.new_tasks)
    engine_seconds = capture_seconds = 0.0
    tokens = size = 0
    # Usually all work lacks the same groups; a store that was extended may need a pass per combination.
    by_groups = sorted(plan.work, key=lambda work: repr(work.groups))
    for groups, works in groupby(by_groups, key=lambda work: work.groups):
        clock = time.monotonic()
        engine = start_engine(prepared, groups, verbose, report) if groups else None
        engine_seconds += time.monotonic() - clock
        clock = time.monotonic()
        try:
            captured = _run(store, prepared, engine, list(works), report)
        finally:
            if engine is not None:
                engine.close()
        capture_seconds += time.monotonic() - clock
        tokens, size = tokens + captured[0], size + captured[1]
    manifest = store.publish_manifest()
    outcome = Outcome(
        plan.samples_total, tokens, size, sidecar_size, engine_seconds, capture_seconds, manifest.digest
    )
    store.add_provenance(provenance.record(request, began, outcome))
    return outcome


def engine_version(request: GenerateRequest) -> str:
    """The version of the engine that would run; RequestError when it is not installed."""
    if request.engine == "vllm":
        from pipeline.engines import vllm_engine

        return vllm_engine.version()
    try:
        import transformers
    except ImportError as error:
        raise RequestError("--engine transformers: not installed; install the extra [train]") from error
    return str(transformers.__version__)


def start_engine(
    prepared: Prepared, groups: tuple[GroupSpec, ...], verbose: bool, report: Reporter
) -> Engine:
    """Load the teacher in the engine asked for, set to capture `groups`."""
    request, teacher = prepared.request, prepared.teacher
    config = EngineConfig(
        model=teacher.path,
        architecture=teacher.architecture,
        groups=groups,
        dtype=request.torch_dtype(teacher),
        max_seq_len=request.sequence_length(teacher),
        vocab_size=teacher.vocab_size,
        hidden_size=teacher.hidden_size,
        tensor_parallel_size=request.tensor_parallel_size,
        max_num_batched_tokens=request.max_num_batched_tokens,
        trust_remote_code=request.trust_remote_code,
        seed=request.seed,
    )
    report.stage(f"starting {request.engine} with {teacher.architecture} in {config.dtype}")
    if request.engine == "vllm":
        from pipeline.engines.vllm_engine import VllmEngine

        return VllmEngine(config, verbose)
    from pipeline.engines.transformers_engine import TransformersEngine

    return TransformersEngine(config)


def _existing(request: GenerateRequest, identity: TeacherIdentity) -> FeatureStore | None:
    """The store at --out when there is one."""
    return FeatureStore.create(request.out, identity) if root_of(request.out).exists(SPEC_FILE) else None


def _lacking(store: FeatureStore | None, parts: Sequence[PlannedPart]) -> tuple[PlannedPart, ...]:
    """The parts that the store does not list, or whose file is gone."""
    files = store.sidecar() if store else {}
    whole = {
        part
        for part, (name, (size, _)) in files.items()
        if store and store.root.size(f"teacher/{name}") == size
    }
    return tuple(part for part in parts if part.spec.part not in whole)


def _put_sidecar(store: FeatureStore, prepared: Prepared, report: Reporter) -> int:
    """Copy the weights that the store lacks, one part at a time; returns their bytes."""
    written = 0
    for part in prepared.sidecar:
        report.stage(f"copying the teacher's {part.spec.part}")
        name, data = part_file(part.spec, part.read())
        store.put_teacher_files({name: data})
        written += len(data)
    return written


def _run(
    store: FeatureStore, prepared: Prepared, engine: Engine | None, works: Sequence[Work], report: Reporter
) -> tuple[int, int]:
    """Capture and commit each task; returns the positions captured and the bytes written.

    Several generators may be at work on the same tasks. Each takes them in an order of its own and leaves out
    what another has committed meanwhile, so they share the work and meet at its end only.
    """
    total = prepared.plan.rows_total
    report.start(total - sum(work.task.rows for work in works), total)
    tokens = 0
    with Committer(store, report) as committer:
        for work in random.SystemRandom().sample(works, len(works)):
            if store.holds(work.task, work.groups):
                report.skip(work.task.rows)
                continue
            samples = _samples_of(store, prepared, work.task)
            features = _features_of(engine, work, samples, report)
            committer.put(work.task, samples, features)
            tokens += work.task.rows
    return tokens, committer.size


def _features_of(
    engine: Engine | None, work: Work, samples: Sequence[Sample], report: Reporter
) -> dict[GroupSpec, list[GroupFeatures]]:
    features: dict[GroupSpec, list[GroupFeatures]] = {group: [] for group in work.groups}
    if engine is not None:
        captures = engine.capture([sample.tokens for sample in samples])
        for sample, captured in zip(samples, captures, strict=True):
            for group, rows in captured.items():
                features[group].append(rows)
            report.advance(len(sample))
    return features


def _samples_of(store: FeatureStore, prepared: Prepared, task: Task) -> list[Sample]:
    if all(sample_id in prepared.samples for sample_id in task.sample_ids):
        return [prepared.samples[sample_id] for sample_id in task.sample_ids]
    # A task of an earlier request that this one overlaps: its tokens are in the store.
    return store.read_samples(task.id)
