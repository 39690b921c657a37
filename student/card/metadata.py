"""The metadata on top of a card, in the hub's own classes. What is not known is left out, not guessed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from distily.safety.markdown import line
from student.card.names import is_hub_name
from student.card.results import Result, results
from student.errors import UserError
from student.report.files import RunFiles, rows_in
from student.report.teachers import stores

_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]+)*|code|multilingual")
TASK = "text-generation"


def check(license: str | None, languages: Sequence[str]) -> None:
    """UserError for a licence or language that is not spelled as the hub does."""
    if license is not None and not _LICENSE.fullmatch(license):
        raise UserError(
            f"--license {license!r} is no identifier of the hub; give one as apache-2.0, llama3.2 or other"
        )
    for language in languages:
        if not _LANGUAGE.fullmatch(language):
            raise UserError(f"--language {language!r} is no language code; give one as en, de or zh")


def metadata(run: RunFiles, license: str | None, languages: Sequence[str]) -> ModelCardData:
    """Of one student. license, languages: as `check` lets through."""
    found = results(run)
    return ModelCardData(
        license=license,
        language=list(languages) or None,
        library_name="transformers" if stock(run) else "distily-cache",
        pipeline_tag=TASK,
        base_model=teacher(run),
        datasets=datasets(run) or None,
        tags=["distily-cache", "knowledge-distillation", *(["bitnet", "1.58-bit"] if ternary(run) else [])],
        model_name=line(run.name) if found else None,
        eval_results=[_eval_result(result) for result in found] or None,
    )


def stock(run: RunFiles) -> bool:
    """Whether transformers alone loads the student, see `student.bitnet.layout`."""
    return not str(run.config.get("model_type")).startswith("subln-")


def ternary(run: RunFiles) -> bool:
    """Whether the student is a BitNet."""
    return bool(run.number("sizes", "ternary_parameters"))


def teacher(run: RunFiles) -> str | list[str] | None:
    """The teacher's name on the hub, of several caches the teachers'; None where there is none."""
    several = stores(run)
    costs = [one.get("cache_cost") for one in several or [run.summary]]
    named = [cost.get("teacher") for cost in costs if isinstance(cost, dict)]
    names = list(dict.fromkeys(str(name) for name in named if is_hub_name(name, _cache(run))))
    return (names if several else names[0]) if names else None


def datasets(run: RunFiles) -> list[str]:
    """Names on the hub of what the teacher read."""
    captures = [run.summary, *stores(run)[1:]]
    names = [record.get("dataset") for one in captures for record in rows_in(one, "captures")]
    return list(dict.fromkeys(str(name) for name in names if is_hub_name(name, _cache(run))))


def _cache(run: RunFiles) -> Path:
    return Path(str(run.summary.get("cache") or "."))


def _eval_result(result: Result) -> EvalResult:
    return EvalResult(
        task_type=TASK,
        dataset_type=result.kind,
        dataset_name=result.dataset,
        dataset_config=result.config,
        dataset_revision=result.revision,
        metric_type=result.metric,
        metric_name=result.label,
        metric_value=result.student,
        metric_config=result.filter,
    )
