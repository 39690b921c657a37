"""What is known of the student's quality, as one list: the card's tables and its metadata show the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from distily.safety.markdown import line
from student.card.names import is_hub_name
from student.report.files import RunFiles, number_in, rows_in, same_tokens

_CACHE = "distily-cache"
HELD_OUT = "held-out samples of the cache"
_ON_CACHE = {
    "kl": "KL(teacher ‖ student), nats",
    "top1_agreement": "same most likely token",
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
}


@dataclass(frozen=True, kw_only=True)
class Result:
    """One number of the student. kind: the hub's name of the data set, where there is one; config: tells it
    from others of that kind; metric: the key in the file; label: for people; teacher, error (standard error):
    None where unknown.
    """

    kind: str
    dataset: str
    metric: str
    label: str
    student: float
    teacher: float | None = None
    error: float | None = None
    teacher_error: float | None = None
    config: str | None = None
    revision: str | None = None
    filter: str | None = None


def results(run: RunFiles) -> list[Result]:
    """Those of eval.json; of its held-out samples, where it has none, the last ones of the training."""
    found = list(_on_cache(run.evaluation.get("cache"))) or list(_last(run))
    return [*found, *_texts(run), *_tasks(run)]


def _on_cache(cache: Any) -> Iterator[Result]:
    manifest = cache.get("manifest") if isinstance(cache, Mapping) else None
    for name, label in _ON_CACHE.items():
        value = number_in(cache, "student", name)
        if value is not None:
            teacher = number_in(cache, "teacher", name)
            error = number_in(cache, "student", f"{name}_se")
            yield Result(
                kind=_CACHE,
                dataset=HELD_OUT,
                metric=name,
                label=label,
                student=value,
                teacher=teacher,
                error=error,
                revision=_name(manifest),
            )


def _last(run: RunFiles) -> Iterator[Result]:
    for name, label in _ON_CACHE.items():
        value = run.number("last_eval", f"eval_{name}")
        if value is not None:
            teacher = run.number("last_eval", f"eval_teacher_{name}")
            revision = _name(run.summary.get("manifest"))
            error = run.number("last_eval", f"eval_{name}_se")
            yield Result(
                kind=_CACHE,
                dataset=HELD_OUT,
                metric=name,
                label=label,
                student=value,
                teacher=teacher,
                error=error,
                revision=revision,
            )


def _texts(run: RunFiles) -> Iterator[Result]:
    for found in rows_in(run.evaluation, "texts"):
        metric = "perplexity" if same_tokens([found]) else "bits_per_byte"
        value = number_in(found, "student", metric)
        name, source = line(found.get("name") or found.get("source")), found.get("source")
        if value is not None:
            yield Result(
                kind=str(source) if is_hub_name(source, run.directory) else "text",
                dataset=name,
                metric=metric,
                label=_ON_CACHE[metric],
                student=value,
                teacher=number_in(found, "teacher", metric),
                config=name,
                revision=_name(found.get("revision")),
            )


def _tasks(run: RunFiles) -> Iterator[Result]:
    for found in rows_in(run.evaluation, "tasks"):
        value, metric = number_in(found, "student"), line(found.get("metric"))
        task, chosen = line(found.get("task")), _name(found.get("filter"))
        chosen = None if chosen == "none" else chosen
        if value is not None:
            yield Result(
                kind=_name(found.get("dataset")) or task,
                dataset=task,
                metric=metric,
                label=f"{metric} ({chosen})" if chosen else metric,
                student=value,
                teacher=number_in(found, "teacher"),
                error=number_in(found, "student_stderr"),
                teacher_error=number_in(found, "teacher_stderr"),
                config=task,
                filter=chosen,
            )


def _name(value: Any) -> str | None:
    return line(value) or None if isinstance(value, str) else None
