"""`distily-train eval` from its request to eval.json: check everything, measure one model after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from distily.checkpoint.weights import weights_digest
from distily.safety.redaction import redact_words
from student.config.precision import inference_device
from student.errors import UserError
from student.evaluation import cache, continuations, harness, texts
from student.evaluation.cache import CachePlan
from student.evaluation.harness import LoadedTasks
from student.evaluation.models import Side, free_memory, student_side, teacher_side
from student.evaluation.planning import plan_cache, plan_trained
from student.evaluation.positions import look_at_samples, write_samples
from student.evaluation.record import VERSION, merged, read_record, write_record
from student.evaluation.request import EvalRequest
from student.evaluation.suites import text_sources
from student.evaluation.texts import TextSource
from student.export.source import quantization_of, read_config


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What is measured, all of it known to be there. trained: samples that the training learned from.
    prompts: as written, and encoded for the student and the teacher.
    """

    request: EvalRequest
    student: Side
    teacher: Side | None
    cache: CachePlan | None
    trained: CachePlan | None
    texts: list[TextSource]
    length: int
    tasks: LoadedTasks | None
    prompts: list[str]
    encoded: dict[Side, list[Tensor]]


@dataclass(frozen=True)
class _Measured:
    """Of one model; texts in the order of the plan's. samples: of the cache, position by position."""

    cache: dict[str, Any] | None
    samples: dict[str, Any] | None
    trained: dict[str, Any] | None
    texts: list[dict[str, Any]]
    tasks: list[dict[str, Any]]
    prompts: dict[str, Any] | None


def evaluate(request: EvalRequest) -> dict[str, Any]:
    """Measure, write eval.json into the student's directory, and return all that it holds now.

    Everything that can be wrong with the request is found before a model is loaded.
    """
    plan = _plan(request)
    student = _measure(plan, plan.student)
    free_memory()
    teacher = _measure(plan, plan.teacher) if plan.teacher else None
    record = merged(read_record(request.directory), _new_record(plan, student, teacher))
    if student.samples and student.cache:
        write_samples(request.directory, student.samples, record["weights"], student.cache["manifest"])
    write_record(request.directory, record)
    return record


def _plan(request: EvalRequest) -> _Plan:
    request.check()
    inference_device()  # refuses a GPU that torch does not see
    student = student_side(request.directory)
    teacher = teacher_side(request.teacher, request.teacher_dtype) if request.teacher else None
    sides = [student, *([teacher] if teacher else [])]
    sources = text_sources(request.texts, tuple(request.suites))
    for source in sources:
        texts.check_text(source)
    length = texts.window_length(request.texts.max_seq_len, sides)
    planned = plan_cache(request) if request.wants_cache else None
    trained = plan_trained(request, planned) if planned and request.cache.trained_samples else None
    options = request.prompts
    prompts = continuations.read_prompts(options.file) if options.file else []
    encoded = {side: continuations.encode(prompts, side, options) for side in sides} if prompts else {}
    if request.engine == "vllm":
        _check_vllm(request)
    return _Plan(
        request=request,
        student=student,
        teacher=teacher,
        cache=planned,
        trained=trained,
        texts=sources,
        length=length,
        tasks=harness.load_tasks(request, sides),
        prompts=prompts,
        encoded=encoded,
    )


def _check_vllm(request: EvalRequest) -> None:
    kind = quantization_of(read_config(request.directory))
    if kind != "none":
        raise UserError(
            f"--engine vllm: vLLM does not read {request.directory}, a BitNet student ({kind} weights); "
            "leave the flag out"
        )
    harness.require("vllm", "--engine vllm")


def _measure(plan: _Plan, side: Side) -> _Measured:
    """The cache is for the student only: it holds the teacher's part."""
    request, in_vllm = plan.request, plan.request.engine == "vllm"
    cached = plan.cache if side is plan.student else None
    here = cached or plan.texts or plan.prompts or (plan.tasks and not in_vllm)
    model: Any = side.load() if here else None
    found, samples = _on_cache(model, cached, side, request.batch_size) if cached else (None, None)
    trained = None
    if cached and plan.trained:
        head = cache.teacher_head(plan.trained, model.device)
        trained = cache.measure(model, plan.trained, head, request.batch_size)
    by_text = [
        texts.measure(
            model,
            side.tokenizer,
            texts.cut(source, plan.student.tokenizer, plan.length, request.limit),
            plan.length,
        )
        for source in plan.texts
    ]
    written = None
    if plan.prompts:
        written = continuations.measure(model, side, plan.encoded[side], request.prompts)
        written |= continuations.machine(model.device)
    tasks = []
    if plan.tasks is not None:
        if in_vllm:
            del model
            free_memory()
            engine = harness.vllm_model(side, request.batch_size)
        else:
            engine = harness.language_model(model, side, request.batch_size)
        tasks = harness.run(engine, plan.tasks, request.limit)
    return _Measured(found, samples, trained, by_text, tasks, written)


def _on_cache(
    student: Any, plan: CachePlan, side: Side, batch_size: int
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The figures, and a few samples position by position; none of a mixture, whose draws are not what a
    teacher expected, and none of a student with another tokenizer, whose positions are not the teacher's.
    """
    head = cache.teacher_head(plan, student.device)
    found = cache.measure(student, plan, head, batch_size)
    return found, None if plan.mixed or plan.other else look_at_samples(student, plan, head, side.tokenizer)


def _new_record(plan: _Plan, student: _Measured, teacher: _Measured | None) -> dict[str, Any]:
    command = redact_words(plan.request.command)
    return {
        "version": VERSION,
        "student": str(plan.request.directory),
        "weights": weights_digest(plan.request.directory),
        "teacher": plan.request.teacher,
        "teacher_dtype": plan.request.teacher_dtype if plan.teacher else None,
        "cache": student.cache and student.cache | {"command": command},
        "trained": student.trained and student.trained | {"command": command},
        "texts": _texts(plan, student, teacher, command),
        "tasks": _tasks(plan, student, teacher, command),
        "prompts": _prompts(plan, student, teacher, command),
    }


def _texts(
    plan: _Plan, student: _Measured, teacher: _Measured | None, command: Sequence[str]
) -> list[dict[str, Any]]:
    theirs = teacher.texts if teacher else [None] * len(plan.texts)
    return [
        {
            "name": source.name,
            "source": source.source,
            "revision": source.revision(),
            "samples": own["documents"],
            "tokens": own["tokens"],
            "bytes": own["bytes"],
            "window": plan.length,
            "command": command,
            "student": _figures(own),
            "teacher": other and _figures(other) | {"tokens": other["tokens"]},
        }
        for source, own, other in zip(plan.texts, student.texts, theirs, strict=True)
    ]


def _figures(measured: dict[str, Any]) -> dict[str, Any]:
    return {name: measured[name] for name in ("ce", "perplexity", "bits_per_byte")}


def _prompts(
    plan: _Plan, student: _Measured, teacher: _Measured | None, command: Sequence[str]
) -> dict[str, Any] | None:
    """How each model continues the prompts, always with its most likely token."""
    if not plan.prompts:
        return None
    options = plan.request.prompts
    return {
        "file": str(options.file),
        "prompts": plan.prompts,
        "chat": options.chat,
        "max_new_tokens": options.max_new_tokens or continuations.NEW_TOKENS,
        "command": command,
        "student": student.prompts,
        "teacher": teacher and teacher.prompts,
    }


def _tasks(
    plan: _Plan, student: _Measured, teacher: _Measured | None, command: Sequence[str]
) -> list[dict[str, Any]]:
    def key(entry: dict[str, Any]) -> tuple[str, ...]:
        return entry["task"], entry["metric"], entry["filter"]

    theirs = {key(entry): entry for entry in teacher.tasks} if teacher else {}
    entries = []
    for own in student.tasks:
        assert plan.tasks is not None
        other = theirs.get(key(own), {})
        asked = plan.tasks.names.get(own["task"], own["task"])
        entries.append(
            {
                "task": own["task"],
                "suite": plan.tasks.suites.get(asked),
                "dataset": own["dataset"],
                "metric": own["metric"],
                "filter": own["filter"],
                "samples": own["samples"],
                "command": command,
                "student": own["value"],
                "student_stderr": own["stderr"],
                "teacher": other.get("value"),
                "teacher_stderr": other.get("stderr"),
            }
        )
    return entries
