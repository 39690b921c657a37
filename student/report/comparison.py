"""What the runs are and what came out: key figures of one, a table of several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from distily.html.page import Cell, Html, cards, facts, row, section, table
from distily.units import duration, number, short, size
from student.report.files import RunFiles, number_in, with_error
from student.report.teachers import shares

# Columns that are key figures of a run, and what they are called there.
_CARDS = {
    "held-out KL": "nats of held-out KL",
    "perplexity": "held-out perplexity",
    "trained on": "perplexity on its own text",
    "teacher's": "the teacher's",
    "agreement": "agree with the teacher",
    "steps": "steps",
    "tokens": "tokens",
    "training": "of training",
    "memory": "peak memory",
}
# Flags that tell runs apart on disk only.
_PLACES = ("output-dir", "json", "run-name", "logging-dir")
_METRICS = {
    "eval_kl": "KL(teacher ‖ student), nats",
    "eval_ce": "cross-entropy, nats",
    "eval_perplexity": "perplexity",
    "eval_teacher_perplexity": "teacher's perplexity",
    "eval_top1_agreement": "same most likely token",
    "eval_bits_per_byte": "bits per byte",
    "eval_teacher_bits_per_byte": "teacher's bits per byte",
}


def key_figures(run: RunFiles) -> Html:
    """Cards of one run."""
    return cards(
        [(_CARDS[name], get(run)) for name, get in (_RESULTS | _RESOURCES).items() if name in _CARDS]
    )


def comparison(runs: Sequence[RunFiles]) -> Html:
    """A row for each run: the flags in which they differ, then what every run has."""
    flags = differing_flags([run.flags for run in runs])
    columns: dict[str, Callable[[RunFiles], Cell]] = {
        **_RESULTS,
        **{f"--{flag}": _flag(flag) for flag in flags},
        "objective": objective,
        "teachers": shares,
        **_RESOURCES,
    }
    known = {name: get for name, get in columns.items() if any(get(run) is not None for run in runs)}
    rows = [(run.name, *(get(run) for get in known.values())) for run in runs]
    return section("Runs", table(("run", *known), rows, sortable=True))


def differing_flags(flags: Sequence[Mapping[str, str]]) -> list[str]:
    """Names of the flags that do not have the same value in all of `flags`; none where one is not known."""
    if not all(flags):
        return []
    names = dict.fromkeys(name for one in flags for name in one if name not in _PLACES)
    return [name for name in names if len({one.get(name) for one in flags}) > 1]


def objective(run: RunFiles) -> str | None:
    """`kl + 0.5 · ce`, of the terms and their weights."""
    terms = run.summary.get("objective")
    if not isinstance(terms, Mapping):
        return None
    return " + ".join(
        str(name) if weight == 1 else f"{_weight(weight)} · {name}" for name, weight in terms.items()
    )


def details(run: RunFiles) -> Html:
    """Of one run: held-out metrics before and after, sizes, and what conversion changed."""
    first, last = run.summary.get("first_eval"), run.summary.get("last_eval")
    rows = [
        (label, _metric(first, name), _metric(last, name))
        for name, label in _METRICS.items()
        if number_in(last, name) is not None
    ]
    steps = (f"step {number(number_in(entry, 'step'))}" for entry in (first, last))
    return section(
        "Before and after",
        row(
            table(("held-out samples", *steps), rows),
            facts(_sizes(run), "Sizes"),
            facts(_drift(run), "Change of final hidden states by conversion"),
        ),
    )


def _metric(entry: Any, name: str) -> Cell:
    return with_error(number_in(entry, name), number_in(entry, f"{name}_se"))


def _flag(name: str) -> Callable[[RunFiles], Cell]:
    return lambda run: run.flags.get(name)


def _sizes(run: RunFiles) -> list[tuple[str, Cell]]:
    ternary, share = run.number("sizes", "ternary_parameters"), run.number("sizes", "ternary_share")
    parts = number(ternary) if share is None else f"{number(ternary)} ({share:.1%})"
    return [
        ("student's parameters", run.number("sizes", "student_parameters")),
        ("of these ternary", parts if ternary else None),
        ("checkpoint", _size(run.number("sizes", "checkpoint_bytes"))),
        ("peak memory of the training", _size(run.number("peak_rss_bytes"))),
        ("peak memory of the GPU", _size(run.number("peak_cuda_bytes"))),
    ]


def _drift(run: RunFiles) -> list[tuple[str, Cell]]:
    return [
        ("calibrated norms alone", run.number("step0_drift", "norms")),
        ("norms and quantisation", run.number("step0_drift", "quantised")),
    ]


def _weight(weight: Any) -> str:
    if isinstance(weight, Mapping):
        return f"{number(number_in(weight, 'from'))}→{number(number_in(weight, 'to'))}"
    return number(weight) if isinstance(weight, int | float) else str(weight)


def _size(count: float | None) -> str | None:
    return None if count is None else size(count)


def _time(run: RunFiles) -> str | None:
    seconds = run.number("seconds")
    return None if seconds is None else duration(seconds)


def _agreement(run: RunFiles) -> str | None:
    share = run.number("last_eval", "eval_top1_agreement")
    return None if share is None else f"{share:.1%}"


def _parameters(run: RunFiles) -> str | None:
    count = run.number("sizes", "student_parameters")
    return None if count is None else short(float(f"{count:.3g}"))


_RESULTS: dict[str, Callable[[RunFiles], Cell]] = {
    "held-out KL": lambda run: _metric(run.summary.get("last_eval"), "eval_kl"),
    "perplexity": lambda run: run.number("last_eval", "eval_perplexity"),
    "teacher's": lambda run: run.number("last_eval", "eval_teacher_perplexity"),
    "trained on": lambda run: number_in(run.evaluation, "trained", "student", "perplexity"),
    "agreement": _agreement,
}
_RESOURCES: dict[str, Callable[[RunFiles], Cell]] = {
    "steps": lambda run: run.number("steps"),
    "tokens": lambda run: run.number("tokens"),
    "training": _time,
    "memory": lambda run: _size(run.number("peak_rss_bytes")),
    "parameters": _parameters,
    "on disk": lambda run: _size(run.number("sizes", "checkpoint_bytes")),
}
