"""A finished training as its files tell it: summary.json, trainer_state.json, config.json, eval.json,
eval-samples.json, and the export_report.json of its exports.

Files of other versions may lack any key, so every look-up may find nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from glob import escape
from pathlib import Path
from typing import Any

from distily.html.page import Cell
from distily.safety.parsing import MAX_LOG, read_json
from distily.units import number
from student.errors import UserError

SUMMARY, STATE, EVALUATION, SAMPLES, CONFIG, SWEEP, EXPORT = (
    "summary.json",
    "trainer_state.json",
    "eval.json",
    "eval-samples.json",
    "config.json",
    "sweep.json",
    "export_report.json",
)


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """name: tells the run from the others on a page. log: Trainer's log entries, oldest first.

    evaluation: of `distily-train eval`, empty without one. samples: what it found position by position, empty
    where that is not there, or of other weights or another cache than `evaluation`. config: config.json of
    the student. exports: reports of those that lie in their default places and are of the weights of
    `evaluation`. flags: name without dashes -> value, as on the command line that made the run, empty where
    it is not recorded.
    """

    name: str
    directory: Path
    summary: Mapping[str, Any]
    log: Sequence[Mapping[str, Any]]
    evaluation: Mapping[str, Any]
    samples: Mapping[str, Any]
    config: Mapping[str, Any]
    exports: Sequence[Mapping[str, Any]]
    layers: int | None
    flags: Mapping[str, str]

    def number(self, *keys: str) -> float | None:
        """The number at that place of the summary, None where there is none."""
        return number_in(self.summary, *keys)

    def series(self, name: str) -> list[tuple[float, float]]:
        """(step, value) of every log entry that has `name`."""
        found = ((number_in(entry, "step"), number_in(entry, name)) for entry in self.log)
        return [(step, value) for step, value in found if step is not None and value is not None]

    def logged(self, prefix: str) -> list[str]:
        """Names in the log that start with `prefix`, in the order of their first entry."""
        return list(dict.fromkeys(name for entry in self.log for name in entry if name.startswith(prefix)))


def read_runs(directories: Sequence[Path]) -> list[RunFiles]:
    """The runs in those directories, named apart; a sweep's directory stands for all its finished runs.

    Raises UserError, naming the directory, for one that is neither.
    """
    found: dict[Path, RunFiles] = {}
    for directory in directories:
        members = [directory]
        if (directory / SWEEP).is_file():
            members = sorted(file.parent for file in directory.glob(f"runs/*/{SUMMARY}"))
            if not members:
                raise UserError(f"{directory}: no run of this sweep has finished yet; run it first")
        found.update((member.resolve(), read_run(member)) for member in members)
    runs = list(found.values())
    return [replace(run, name=name) for run, name in zip(runs, _names(list(found)), strict=True)]


def read_run(directory: Path) -> RunFiles:
    """Raises UserError where `directory` is no output of a training."""
    if not (directory / SUMMARY).is_file():
        raise UserError(
            f"{directory} has no {SUMMARY}; give the --output-dir of a finished `distily-train from-cache`"
        )
    summary = _object(directory / SUMMARY)
    state, evaluation, samples, config = (
        _object(directory / name) if (directory / name).is_file() else {}
        for name in (STATE, EVALUATION, SAMPLES, CONFIG)
    )
    log = state.get("log_history")
    layers = number_in(config, "num_hidden_layers") or number_in(config, "text_config", "num_hidden_layers")
    return RunFiles(
        name=directory.resolve().name,
        directory=directory,
        summary=summary,
        log=[entry for entry in log if isinstance(entry, dict)] if isinstance(log, list) else [],
        evaluation=evaluation,
        samples=samples if _belong(samples, evaluation) else {},
        config=config,
        exports=_exports(directory.resolve(), evaluation.get("weights")),
        layers=None if layers is None else int(layers),
        flags=_flags(summary.get("command")),
    )


def number_in(value: Any, *keys: str) -> float | None:
    """The finite number at value[key][key]…; None where there is none."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def same_tokens(texts: Sequence[Mapping[str, Any]]) -> bool:
    """Whether all students and teachers cut a text into as many tokens, so that perplexities compare. texts:
    what eval.json of each says of it.
    """
    counts = [number_in(text, *keys) for text in texts for keys in (("tokens",), ("teacher", "tokens"))]
    return len({count for count in counts if count is not None}) < 2


def teacher_tokens(summary: Mapping[str, Any]) -> float | None:
    """The teacher's tokens that a training learned from, repetitions included: as many as the student's,
    unless its tokenizer is another.
    """
    tokens = number_in(summary, "tokens")
    return None if tokens is None else tokens / (number_in(summary, "tokens_of_both", "expansion") or 1.0)


def with_error(value: float | None, error: float | None) -> Cell:
    """`0.123 ± 0.004`, with the standard error; the number where that is not known, as in older files."""
    return value if value is None or error is None else f"{number(value)} ± {error:.2g}"


def rows_in(value: Any, *keys: str) -> list[Mapping[str, Any]]:
    """The objects of the list at value[key][key]…"""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return [row for row in value if isinstance(row, Mapping)] if isinstance(value, list) else []


def _belong(samples: Mapping[str, Any], evaluation: Mapping[str, Any]) -> bool:
    """Whether both are of the same weights and manifest; older evaluations have no samples beside them."""
    cache = evaluation.get("cache")
    manifest = cache.get("manifest") if isinstance(cache, Mapping) else None
    here = (evaluation.get("weights"), manifest)
    return None not in here and here == (samples.get("weights"), samples.get("manifest"))


def _exports(directory: Path, weights: Any) -> list[dict[str, Any]]:
    """Reports of the directories that `distily-train export` names by default; none of other weights."""
    files = sorted(directory.parent.glob(f"{escape(directory.name)}-*/{EXPORT}"))
    return [found for found in map(_object, files) if weights is not None and found.get("weights") == weights]


def _object(file: Path) -> dict[str, Any]:
    try:
        value = read_json(file, MAX_LOG)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); train or evaluate again") from error
    if not isinstance(value, dict):
        raise UserError(f"{file} holds no JSON object; train or evaluate again")
    return value


def _flags(command: Any) -> dict[str, str]:
    """{"lr": "0.1", "json": "True"} of [..., "--lr", "0.1", "--json"]."""
    words = [str(word) for word in command] if isinstance(command, list) else []
    flags: dict[str, str] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, given, value = word[2:].partition("=")
            name = name.replace("_", "-")
            flags[name] = value if given else "True"
        elif name:
            flags[name] = word
            name = ""
    return flags


def _names(directories: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart, all of as many parts."""
    for parts in range(1, max((len(path.parts) for path in directories), default=1) + 1):
        names = ["/".join(path.parts[-parts:]) for path in directories]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in directories]
