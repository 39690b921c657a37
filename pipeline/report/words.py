"""A sample token by token: the text coloured by how expected each word was, and what else the teacher saw."""

from __future__ import annotations

from itertools import pairwise

from distily.html.page import Cell, Html, html, note, section, table
from featurestore.maintenance.inspect import RowView, SampleView
from pipeline.report.terminal import shown, text_of
from pipeline.report.token_text import Pieces

# Least probability of each colour, from expected to surprising.
_STEPS = (0.5, 0.1, 0.01, 0.001, 0.0)
_NAMES = ("over 50 %", "10 to 50 %", "1 to 10 %", "0.1 to 1 %", "below 0.1 %")


def sample_section(view: SampleView | None, pieces: Pieces | None) -> Html:
    """Nothing without a view."""
    if view is None:
        return Html("")
    first = _word(view.rows[0].token, None, pieces)
    rest = (_word(row.token, before.probability, pieces) for before, row in pairwise(view.rows))
    text = Html(f'<div class="words">{first}{"".join(rest)}</div>')
    keys = " ".join(f'<span class="h{step}">{name}</span>' for step, name in enumerate(_NAMES))
    legend = Html(f'<p class="note">How probable the teacher held each token, given those before: {keys}</p>')
    header = (
        "position",
        "token",
        "p(next)",
        "entropy, nats",
        "in the head",
        "the teacher's best for the next",
    )
    rows = [_row(row, pieces) for row in view.rows]
    return section(
        "A sample, token by token",
        note(f"Sample {view.index} ({view.id}): {len(view.rows):,} of {view.length:,} tokens."),
        text,
        legend,
        table(header, rows, "After each token", tall=True),
    )


def _word(token: int, probability: float | None, pieces: Pieces | None) -> Html:
    """One token; without a probability (the first one, or one that is not known) it has no colour."""
    text = text_of(token, pieces)
    body = f"{token} " if text is None else text.replace("\n", "↵\n")
    if probability is None:
        return Html(f"<span>{html(body)}</span>")
    step = next(index for index, least in enumerate(_STEPS) if probability >= least)
    return Html(f'<span class="h{step}" title="{probability:.3g}">{html(body)}</span>')


def _row(row: RowView, pieces: Pieces | None) -> tuple[Cell, ...]:
    best = "  ".join(f"{shown(token, pieces)} {p:.2f}" for token, p in row.best)
    return row.position, shown(row.token, pieces), row.probability, row.entropy, row.head_mass, best
