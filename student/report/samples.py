"""Samples of the cache position by position, teacher and students side by side (eval-samples.json)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distily.html.page import Cell, Html, note, section, table
from distily.html.tokens import ENTROPY, Guesses, Shade, Word, coloured_text
from student.report.files import RunFiles, number_in, rows_in

# What a page shows of many runs.
MOST_STUDENTS, MOST_SAMPLES = 6, 4
_KL_EDGES = (0.01, 0.1, 0.5, 1.5)
_KL_RANGES = ("up to 0.01 nats", "0.01 to 0.1", "0.1 to 0.5", "0.5 to 1.5", "over 1.5 nats")
_EXACTNESS = {
    "lower bound": "The KL takes what is outside the stored head as one bucket: it is a lower bound.",
    "unbiased": "The KL is estimated from draws of the teacher's tail: that of a single position scatters.",
}


@dataclass(frozen=True, kw_only=True)
class _Sample:
    """A sample as some students were measured on it. tokens: from `start` on. rows: of each student, by the
    place of the token that they are about. kinds: of their KL.
    """

    id: str
    length: int
    start: int
    tokens: list[int]
    texts: Mapping[str, Any]
    students: list[str]
    rows: list[Mapping[int, Mapping[str, Any]]]
    kinds: set[str]

    def shown(self, token: int) -> str:
        """Its text in quotes, or the id where there is none."""
        text = self.texts.get(str(token))
        return repr(text) if isinstance(text, str) and text else str(token)

    def text(self, token: int) -> str:
        """Its text, or the id."""
        text = self.texts.get(str(token))
        return text if isinstance(text, str) and text else f"{token} "


def samples_section(runs: Sequence[RunFiles]) -> Html:
    """Nothing where no run has been looked at position by position."""
    known = [run for run in runs if rows_in(run.samples, "samples")]
    names = ["the student"] if len(runs) == 1 else [run.name for run in known]
    samples = _samples(known[:MOST_STUDENTS], names)
    if not samples:
        return Html("")
    kinds = {kind for sample in samples for kind in sample.kinds}
    left_out = f" The first {MOST_STUDENTS} of {len(known)} students are shown."
    return section(
        "Samples, token by token",
        note(
            "Rest on a token, tap it, or walk with the arrow keys to see what the teacher and the students "
            "expected in its place; ✓ marks the token itself. Tokens without details are not learned from."
            + (left_out if len(known) > MOST_STUDENTS else "")
        ),
        *(note(said) for kind, said in _EXACTNESS.items() if kind in kinds),
        *(part for place, sample in enumerate(samples) for part in _shown(place, sample)),
    )


def _samples(runs: Sequence[RunFiles], names: Sequence[str]) -> list[_Sample]:
    """Runs stand side by side where they were measured on the same sample of the same cache."""
    found: dict[tuple[str, str], list[tuple[str, RunFiles, Mapping[str, Any]]]] = {}
    for run, name in zip(runs, names, strict=False):
        for sample in rows_in(run.samples, "samples"):
            key = str(run.samples.get("manifest")), str(sample.get("id"))
            found.setdefault(key, []).append((name, run, sample))
    return [
        _Sample(
            id=key[1],
            length=int(number_in(same[0][2], "length") or 0),
            start=int(number_in(same[0][2], "start") or 0),
            tokens=_ids(same[0][2].get("tokens")),
            texts=_object(same[0][1].samples.get("texts")),
            students=[name for name, _, _ in same],
            rows=[dict(_by_token(sample)) for _, _, sample in same],
            kinds={_kind(run) for _, run, _ in same},
        )
        for key, same in list(found.items())[:MOST_SAMPLES]
    ]


def _by_token(sample: Mapping[str, Any]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """What was expected at a position is about the token after it."""
    for row in rows_in(sample, "positions"):
        position = number_in(row, "position")
        if position is not None:
            yield int(position) + 1, row


def _shown(place: int, sample: _Sample) -> tuple[Html, Html, Html]:
    shades = [Shade(f"KL of {name}", _KL_EDGES, _KL_RANGES) for name in sample.students]
    words = [_word(sample, sample.start + at, token) for at, token in enumerate(sample.tokens)]
    end = sample.start + len(sample.tokens)
    label = f"Sample {sample.id}: tokens {sample.start:,} to {end - 1:,} of {sample.length:,}"
    return (
        note(f"{label}."),
        coloured_text(str(place), label, [*shades, ENTROPY], words),
        _table(sample, label),
    )


def _word(sample: _Sample, at: int, token: int) -> Word:
    rows = [rows.get(at) for rows in sample.rows]
    teacher = next((row for row in rows if row is not None), None)
    if teacher is None:
        return Word(text=sample.text(token))
    entropy = number_in(teacher, "entropy")
    about = [
        _probability(teacher, "teacher_ce"),
        _figure("entropy {:.2f} nats", entropy),
        _figure("{:.1%} in the head", number_in(teacher, "head_mass")),
    ]
    theirs = Guesses(
        who="the teacher",
        remark=" · ".join(filter(None, about)),
        best=_best(sample, teacher, "teacher"),
        actual=_place(teacher, "teacher", token),
    )
    students = [
        Guesses(
            who=name,
            remark=" · ".join(
                filter(None, (_figure("KL {:.3g} nats", number_in(row, "kl")), _probability(row, "ce")))
            ),
            best=_best(sample, row, "student"),
            actual=_place(row, "student", token),
        )
        for name, row in zip(sample.students, rows, strict=True)
    ]
    return Word(
        text=sample.text(token),
        values=[*(number_in(row, "kl") for row in rows), entropy],
        title=f"Position {at}: {sample.shown(token)}",
        guesses=[theirs, *students],
    )


def _table(sample: _Sample, label: str) -> Html:
    """A row for each token that is learned from, with the best of everyone."""
    each = [(f"KL of {name}, nats", f"best of {name}") for name in sample.students]
    header = (
        "position",
        "token",
        "entropy, nats",
        "best of the teacher",
        *(name for pair in each for name in pair),
    )
    rows = []
    for at, token in enumerate(sample.tokens, sample.start):
        found = [rows.get(at) for rows in sample.rows]
        teacher = next((row for row in found if row is not None), None)
        if teacher is not None:
            cells: list[Cell] = [at, sample.shown(token), number_in(teacher, "entropy")]
            cells.append(_first(sample, teacher, "teacher"))
            for row in found:
                cells += [number_in(row, "kl"), _first(sample, row, "student")]
            rows.append(cells)
    return table(header, rows, f"{label}, in numbers", tall=True, sortable=True)


def _first(sample: _Sample, row: Any, side: str) -> str | None:
    return next((f"{text} {p:.2f}" for text, p in _best(sample, row, side)), None)


def _best(sample: _Sample, row: Any, side: str) -> list[tuple[str, float]]:
    return [(sample.shown(token), p) for token, p in _pairs(row, side)]


def _place(row: Any, side: str, token: int) -> int | None:
    """Of a token among the best."""
    return next((place for place, (other, _) in enumerate(_pairs(row, side)) if other == token), None)


def _pairs(row: Any, side: str) -> list[tuple[int, float]]:
    """(token, probability) of what stands under `side`; of anything else nothing."""
    pairs = row.get(side) if isinstance(row, Mapping) else None
    found = [_numbers(pair) for pair in pairs] if isinstance(pairs, list) else []
    return [(int(pair[0]), pair[1]) for pair in found if len(pair) == 2]


def _ids(value: Any) -> list[int]:
    return [int(token) for token in _numbers(value)]


def _numbers(value: Any) -> list[float]:
    """The finite numbers of a list."""
    found = [number_in({"": one}, "") for one in value] if isinstance(value, list) else []
    return [one for one in found if one is not None]


def _probability(row: Any, name: str) -> str | None:
    """Of the token that came, from its nats under `name`."""
    nats = number_in(row, name)
    return None if nats is None else f"p {math.exp(-max(nats, 0)):.3g} · log p {-nats:z.2f}"


def _figure(text: str, value: float | None) -> str | None:
    return None if value is None else text.format(value)


def _kind(run: RunFiles) -> str:
    """How exact the run's KL is."""
    return str(_object(_object(run.evaluation.get("cache")).get("exactness")).get("kl"))


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
