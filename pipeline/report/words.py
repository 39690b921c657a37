"""A sample token by token: the text coloured by how uncertain the teacher was, and what else it saw."""

from __future__ import annotations

import math
from itertools import pairwise

from distily.html.page import Cell, Html, note, section, table
from distily.html.tokens import ENTROPY, Guesses, Shade, Word, coloured_text
from featurestore.maintenance.inspect import RowView, SampleView
from pipeline.report.terminal import shown, text_of
from pipeline.report.token_text import Pieces

# Of -p, so that the first colour is that of what was expected.
_PROBABILITY = Shade(
    "how probable it held each token",
    (-0.5, -0.1, -0.01, -0.001),
    ("over 50 %", "10 to 50 %", "1 to 10 %", "0.1 to 1 %", "below 0.1 %"),
)


def sample_section(view: SampleView | None, pieces: Pieces | None) -> Html:
    """Nothing without a view."""
    if view is None:
        return Html("")
    words = [Word(text=_text(view.rows[0].token, pieces))]
    words += [_word(before, row, pieces) for before, row in pairwise(view.rows)]
    header = (
        "position",
        "token",
        "p(next)",
        "entropy, nats",
        "in the head",
        "the teacher's best for the next",
    )
    return section(
        "A sample, token by token",
        note(
            f"Sample {view.index} ({view.id}): {len(view.rows):,} of {view.length:,} tokens. Rest on a "
            "token, tap it, or walk with the arrow keys to see what the teacher expected in its place."
        ),
        coloured_text("s", f"Sample {view.index}", (ENTROPY, _PROBABILITY), words),
        table(
            header,
            [_row(row, pieces) for row in view.rows],
            "After each token",
            tall=True,
            sortable=True,
        ),
    )


def _word(before: RowView, row: RowView, pieces: Pieces | None) -> Word:
    """A token, with the distribution that it is an outcome of: that of the position before it."""
    p = before.probability
    teacher = Guesses(
        who="The teacher's best",
        remark=" · ".join(_numbers(before)),
        best=[(shown(token, pieces), probability) for token, probability in before.best],
        actual=next((place for place, (token, _) in enumerate(before.best) if token == row.token), None),
    )
    return Word(
        text=_text(row.token, pieces),
        values=(before.entropy, None if p is None else -p),
        title=f"Position {row.position}: {shown(row.token, pieces)}",
        guesses=[teacher],
    )


def _numbers(row: RowView) -> list[str]:
    """What is known of a distribution and of the token that came."""
    p = row.probability
    return [
        *([] if p is None else [f"p {p:.3g}"]),
        *([f"log p {math.log(p):z.2f}"] if p else []),
        *([] if row.entropy is None else [f"entropy {row.entropy:.2f} nats"]),
        f"{row.head_mass:.1%} in the head",
    ]


def _text(token: int, pieces: Pieces | None) -> str:
    return text_of(token, pieces) or f"{token} "


def _row(row: RowView, pieces: Pieces | None) -> tuple[Cell, ...]:
    best = "  ".join(f"{shown(token, pieces)} {p:.2f}" for token, p in row.best)
    return row.position, shown(row.token, pieces), row.probability, row.entropy, row.head_mass, best
