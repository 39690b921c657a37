"""The page: sections in order. Nothing is computed that the runs' files do not say."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path, PurePath

from distily.html.page import Html, code, note, page, paragraph, section, write
from distily.safety.redaction import redact_words
from distily.units import duration
from student.report.blocks import blocks_section
from student.report.comparison import comparison, details, key_figures, objective
from student.report.continuations import continuations
from student.report.curves import held_out, ternary, training
from student.report.evaluation import evaluation
from student.report.files import RunFiles, read_run
from student.report.samples import samples_section
from student.report.savings import cost_section
from student.report.teachers import stores, teachers_section

REPORT = "report.html"


def write_report(directory: Path) -> None:
    """Write report.html about the training in `directory`, from its files alone."""
    write(directory / REPORT, runs_page([read_run(directory)]))


def runs_page(runs: Sequence[RunFiles]) -> str:
    """The whole page about one or several runs; what a run does not tell is left out."""
    alone = len(runs) == 1
    title = f"Distillation of {runs[0].name}" if alone else f"Distillation: {len(runs)} runs"
    head = (paragraph(_lead(runs[0])), key_figures(runs[0])) if alone else (comparison(runs),)
    return page(
        title,
        *head,
        continuations(runs),
        held_out(runs),
        details(runs[0]) if alone else Html(""),
        teachers_section(runs[0]) if alone else Html(""),
        blocks_section(runs[0]) if alone else Html(""),
        training(runs),
        ternary(runs),
        evaluation(runs),
        samples_section(runs),
        cost_section(runs),
        _commands(runs),
    )


def _lead(run: RunFiles) -> str:
    """What was trained, on what, for how long; of what is known."""
    teacher = run.summary.get("cache_cost")
    name = teacher.get("teacher") if isinstance(teacher, dict) else None
    kind = "BitNet b1.58 student" if run.number("sizes", "ternary_parameters") else "student"
    layers = f"{run.layers}-layer " if run.layers else ""
    several = len(stores(run))
    source = f"{several} caches of their features" if several else "a cache of its features"
    said = f"A {layers}{kind} of {name or 'a teacher'}, trained from {source}"
    samples, steps, seconds = run.number("train_samples"), run.number("steps"), run.number("seconds")
    if samples is not None and steps is not None:
        said += f" on {samples:,.0f} samples in {steps:,.0f} steps"
        passes = run.series("epoch")
        said += f", each sample read {passes[-1][1]:.3g} times" if passes else ""
    if seconds is not None:
        said += f", {duration(seconds)}"
    if pace := run.number("tokens_per_second"):
        said += f" ({pace:,.0f} tokens/s, evaluations included)"
    held = run.number("held_out_samples")
    rest = f" {held:,.0f} samples were held out." if held else ""
    terms = objective(run)
    loss = f" It minimised {terms}." if terms else ""
    whose = "The teachers' models were" if several else "The teacher's model was"
    return f"{said}.{loss}{rest} {whose} not in the training process."


def _commands(runs: Sequence[RunFiles]) -> Html:
    """The command lines that made the runs, and on what they ran, where that is recorded."""
    parts = []
    for run in runs:
        words = run.summary.get("command")
        if isinstance(words, list) and words:
            words = redact_words([str(word) for word in words])
            line = shlex.join([PurePath(words[0]).name, *words[1:]])
            parts += [code(line), note(f"{run.name}{_environment(run)}.")]
    return section("The commands", *parts)


def _environment(run: RunFiles) -> str:
    found = run.summary.get("environment")
    named = found.items() if isinstance(found, dict) else ()
    return "".join(f"; {name} {value}" for name, value in named if value is not None)
