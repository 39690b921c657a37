"""What `distily-train eval` found, student and teacher side by side (eval.json)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from distily.html.chart import Series, line_chart
from distily.html.page import Cell, Html, note, row, section, table
from distily.units import number
from student.report.files import RunFiles, number_in, rows_in, same_tokens, with_error

Name = TypeVar("Name")

_METRICS = {
    "kl": "KL(teacher ‖ student), nats",
    "reverse_kl": "KL(student ‖ teacher), nats",
    "ce": "cross-entropy, nats",
    "perplexity": "perplexity",
    "top1_agreement": "same most likely token",
    "calibration_error": "calibration error",
    "bits_per_byte": "bits per byte",
}


def evaluation(runs: Sequence[RunFiles]) -> Html:
    """On the cache, on texts and on tasks; nothing where no run has been evaluated."""
    runs = [run for run in runs if run.evaluation]
    return section(
        "Evaluation",
        row(_on_cache(runs, "cache", "on the cache"), _on_cache(runs, "trained", "on samples trained on")),
        row(
            *_by(runs, "by_position", "position in the sample", log_x=True),
            *_by(runs, "by_entropy", "entropy of the teacher, nats", log_x=False),
        ),
        _texts(runs),
        _tasks(runs),
        note("Made by `distily-train eval`; eval.json of each run has the commands.") if runs else Html(""),
    )


def _on_cache(runs: Sequence[RunFiles], key: str, header: str) -> Html:
    """What stands under `key`. The teacher's column is that of the first run whose evaluation has it."""
    runs = [run for run in runs if isinstance(run.evaluation.get(key), Mapping)]
    rows: list[tuple[Cell, ...]] = []
    for name, label in _METRICS.items():
        students = [
            with_error(*(number_in(run.evaluation, key, "student", one) for one in (name, f"{name}_se")))
            for run in runs
        ]
        teacher = _first(number_in(run.evaluation, key, "teacher", name) for run in runs)
        if any(value is not None for value in (*students, teacher)):
            rows.append((label, *students, teacher))
    return table((header, *_names(runs), "teacher"), rows)


def _by(runs: Sequence[RunFiles], key: str, x_label: str, log_x: bool) -> list[Html]:
    """Two charts over the buckets of `key`: KL, and cross-entropy beside the teacher's."""
    named = list(zip(_names(runs), runs, strict=True))
    kl = [Series(name, _points(run, key, "kl")) for name, run in named]
    ce = [Series(name, _points(run, key, "ce")) for name, run in named]
    teacher = next(filter(None, (_points(run, key, "teacher_ce") for run in runs)), [])
    what = key.replace("_", " ")
    return [
        line_chart(f"KL {what}", kl, x_label, "nats per token", log_x=log_x),
        line_chart(
            f"Cross-entropy {what}",
            [*ce, Series("teacher", teacher, dashed=True)],
            x_label,
            "nats per token",
            log_x=log_x,
        ),
    ]


def _points(run: RunFiles, key: str, name: str) -> list[tuple[float, float]]:
    """A bucket stands at its middle; an open one at its start."""
    points = []
    for bucket in rows_in(run.evaluation, "cache", key):
        low, high, value = (number_in(bucket, field) for field in ("from", "to", name))
        if low is not None and value is not None:
            points.append(((low + (low if high is None else high)) / 2, value))
    return points


def _matched(
    runs: Sequence[RunFiles], key: str, name: Callable[[Mapping[str, Any]], Name]
) -> Iterator[tuple[Name, list[Mapping[str, Any] | None], Mapping[str, Any]]]:
    """For each name that any run has under `key` of its evaluation: the rows of all runs, and the first."""
    found = [{name(row): row for row in rows_in(run.evaluation, key)} for run in runs]
    for one in dict.fromkeys(known for rows in found for known in rows):
        rows = [of_run.get(one) for of_run in found]
        yield one, rows, next(row for row in rows if row is not None)


def _texts(runs: Sequence[RunFiles]) -> Html:
    """Perplexity on texts: a row for each text that any run was evaluated on. Bits per byte, where not all
    cut a text into the same number of tokens.
    """
    found = list(_matched(runs, "texts", _text))
    same = all(same_tokens([text for text in texts if text]) for _, texts, _ in found)
    metric, title = ("perplexity", "Perplexity") if same else ("bits_per_byte", "Bits per byte")
    rows: list[tuple[Cell, ...]] = []
    for name, texts, known in found:
        students = [number_in(text, "student", metric) for text in texts]
        teacher = _first(number_in(text, "teacher", metric) for text in texts)
        rows.append((name, number_in(known, "tokens"), *students, teacher))
    return table(("text", "tokens", *_names(runs), "teacher"), rows, f"{title} on texts")


def _text(text: Mapping[str, Any]) -> str:
    return str(text.get("name") or text.get("source"))


def _tasks(runs: Sequence[RunFiles]) -> Html:
    rows: list[tuple[Cell, ...]] = []
    for name, tasks, known in _matched(runs, "tasks", _task):
        students = [_score(task, "student") for task in tasks]
        teacher = _first(_score(task, "teacher") for task in tasks)
        rows.append((*name, number_in(known, "samples"), *students, teacher))
    return table(("task", "metric", "samples", *_names(runs), "teacher"), rows, "Tasks")


def _task(task: Mapping[str, Any]) -> tuple[str, str]:
    chosen = task.get("filter")
    metric = str(task.get("metric"))
    return str(task.get("task")), metric if chosen in (None, "none") else f"{metric} ({chosen})"


def _score(task: Mapping[str, Any] | None, who: str) -> str | None:
    value, error = number_in(task, who), number_in(task, f"{who}_stderr")
    if value is None:
        return None
    return number(value) if error is None else f"{number(value)} ± {number(error)}"


def _names(runs: Sequence[RunFiles]) -> list[str]:
    return ["student"] if len(runs) == 1 else [run.name for run in runs]


def _first(values: Any) -> Any:
    return next((value for value in values if value is not None), None)
