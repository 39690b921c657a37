"""How teacher and students continue the same prompts, how fast, and how large they are (`eval --prompts`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distily.html.page import Cell, Html, note, section, table, written
from distily.units import number, size
from student.report.files import RunFiles, number_in, rows_in

TEACHER = "teacher"


def continuations(runs: Sequence[RunFiles]) -> Html:
    """Nothing where no run has continued prompts. Teacher and settings are those of the first that has."""
    runs = [run for run in runs if isinstance(run.evaluation.get("prompts"), Mapping)]
    if not runs:
        return Html("")
    first = next((run for run in runs if _side(run, "teacher")), runs[0])
    sides = [(TEACHER, first, _side(first, "teacher"))] if _side(first, "teacher") else []
    names = ["student"] if len(runs) == 1 else [run.name for run in runs]
    sides += [(name, run, _side(run, "student")) for name, run in zip(names, runs, strict=True)]
    prompts = dict.fromkeys(prompt for run in runs for prompt in _prompts(run))
    texts = [(written(prompt), *(_text(run, side, prompt) for _, run, side in sides)) for prompt in prompts]
    return section(
        "Continuations",
        note(_how(first)),
        table(("prompt", *(name for name, _, _ in sides)), texts),
        table(_SPEED, [_speed(name, run, side) for name, run, side in sides]),
        note(_where(first)),
    )


_SPEED = ("model", "tokens/s", "computed in", "weights in memory", "checkpoint", "exported")


def _side(run: RunFiles, side: str) -> Mapping[str, Any]:
    return _object(_object(run.evaluation.get("prompts")).get(side))


def _prompts(run: RunFiles) -> list[str]:
    found = _object(run.evaluation.get("prompts")).get("prompts")
    return [prompt for prompt in found if isinstance(prompt, str)] if isinstance(found, list) else []


def _text(run: RunFiles, side: Mapping[str, Any], prompt: str) -> Cell:
    """What this side made of a prompt; None where it was not asked."""
    for known, one in zip(_prompts(run), rows_in(side, "continuations"), strict=False):
        if known == prompt and isinstance(one.get("text"), str):
            return written(one["text"] + (" ∎" if one.get("ended") is True else ""))
    return None


def _speed(name: str, run: RunFiles, side: Mapping[str, Any]) -> tuple[Cell, ...]:
    exported = [
        f"{one.get('format')}: {_size(number_in(one, 'bytes'))}"
        for one in (run.exports if name != TEACHER else ())
    ]
    return (
        name,
        number_in(side, "tokens_per_second"),
        str(side.get("dtype")),
        _size(number_in(side, "weight_bytes")),
        _size(number_in(side, "checkpoint_bytes")),
        ", ".join(exported) or None,
    )


def _how(run: RunFiles) -> str:
    prompts = _object(run.evaluation.get("prompts"))
    chat = " Prompts are in the chat template." if prompts.get("chat") is True else ""
    most = number(number_in(prompts, "max_new_tokens"))
    return (
        f"As they were written: at each step the most likely token, {most} tokens at most; ∎ where a model "
        f"ended the text itself.{chat}"
    )


def _where(run: RunFiles) -> str:
    student = _side(run, "student")
    threads = number_in(student, "threads")
    on = f"{student.get('device')}" + (f", {number(threads)} thread{'s' * (threads > 1)}" if threads else "")
    return (
        f"Tokens per second in PyTorch on {on}, one prompt at a time, in one process after each other; a "
        "student's ternary matrices are unpacked at every step. Checkpoints of ternary students hold latent "
        "weights, which are needed for training only."
    )


def _size(count: float | None) -> str | None:
    return None if count is None else size(count)


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
