"""From a specification to runs: which flags each one has, and what it is called. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from featurestore.identity import canonical_json, digest
from student.config.flagfile import command_line
from student.errors import UserError
from student.sweep.spec import Flags, Range, SweepAxis, SweepSpec, label

SLUG_LENGTH = 80


@dataclass(frozen=True)
class SweepRun:
    """One training. settings: what was varied, axis -> label; flags: those of `from-cache`; key: a hash of
    them, by which a finished run is recognised.
    """

    settings: Mapping[str, str]
    flags: Flags
    key: str

    @property
    def name(self) -> str:
        """Readable, and never that of a run with other flags."""
        slug = "_".join(f"{axis}={value}" for axis, value in self.settings.items())
        return f"{re.sub(r'[^A-Za-z0-9.,=+_-]+', '-', slug)[:SLUG_LENGTH]}-{self.key}"

    def words(self) -> list[str]:
        """The flags as a command line has them."""
        return command_line(self.flags, "sweep")


def expand(spec: SweepSpec) -> list[SweepRun]:
    """Every combination of the grid, seeds innermost. UserError where two of them are the same training."""
    runs = [run for choices in product(*_labelled(spec.grid)) for run in seeded(spec, choices)]
    names: dict[str, str] = {}
    for run in runs:
        if run.key in names:
            raise UserError(f"{names[run.key]} and {run.name} have the same flags; leave one of them out")
        names[run.key] = run.name
    return runs


Choice = tuple[str, str, Flags]  # axis, label, what it sets


def seeded(spec: SweepSpec, choices: Sequence[Choice]) -> list[SweepRun]:
    """The runs of one setting: one for each seed."""
    seeds = _labelled([spec.seeds] if spec.seeds else [])
    return [_run(spec.base, [*choices, *seed]) for seed in product(*seeds)]


def corners(spec: SweepSpec) -> list[SweepRun]:
    """Runs that between them try each choice and each end of the space of a search."""
    assert spec.search is not None
    ends = [_ends(axis) for axis in spec.search.space]
    first = [choices[0] for choices in ends]
    tried = [first] + [
        [*first[:place], choice, *first[place + 1 :]]
        for place, choices in enumerate(ends)
        for choice in choices[1:]
    ]
    return [run for choices in tried for run in seeded(spec, choices)[:1]]


def chosen(axis: SweepAxis | Range, value: float | str) -> Choice:
    """What a search's choice means: a label of an axis, or a number of a range."""
    if isinstance(axis, Range):
        return axis.name, label(value), {axis.name: value}
    return axis.name, str(value), axis.choices[str(value)]


def _ends(axis: SweepAxis | Range) -> list[Choice]:
    values = [axis.low, axis.high] if isinstance(axis, Range) else list(axis.choices)
    return [chosen(axis, value) for value in values]


def _labelled(axes: Iterable[SweepAxis]) -> list[list[Choice]]:
    return [[(axis.name, name, flags) for name, flags in axis.choices.items()] for axis in axes]


def _run(base: Flags, choices: Sequence[Choice]) -> SweepRun:
    flags = dict(base)
    for _, _, sets in choices:
        flags |= sets
    flags = {name: value for name, value in flags.items() if value is not None}
    words = command_line(flags, "sweep")
    key = digest(canonical_json(dict(zip(words[::2], words[1::2], strict=True))), 8)
    return SweepRun({axis: name for axis, name, _ in choices}, flags, key)
