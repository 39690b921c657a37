"""What lies in a store, drawn: bytes and mass as bars, one sample token by token."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from featurestore.maintenance.info import StoreInfo
from featurestore.maintenance.inspect import RankMass, SampleView
from pipeline.report.token_text import Pieces

_BAR = 30


def bar(share: float) -> str:
    """A bar for a share in [0, 1]; what is not zero shows."""
    return "█" * max(1, round(_BAR * share)) if share > 0 else ""


def render_sizes(console: Console, info: StoreInfo) -> None:
    """Bytes of each column group and of each of its arrays, against the whole store."""
    table = Table("", "bytes", "share", "", title="where the bytes are", box=box.SIMPLE)
    for name, group in sorted(info.groups.items(), key=lambda item: -item[1].bytes):
        for label, size in ((name, group.bytes), *sorted(group.arrays.items(), key=lambda item: -item[1])):
            share = size / info.bytes
            indent = "" if label == name else "  "
            table.add_row(f"{indent}{label}", decimal(size), f"{share:.1%}", bar(share))
    console.print(table)


def render_ranks(console: Console, found: RankMass) -> None:
    """Mean probability at ranks 1, 2, 4, ..., and the mean mass up to them as bars."""
    positions = f"{found.rows:,} positions that are learned from"
    title = f"mass by rank, from {found.samples:,} of {found.of:,} samples ({positions})"
    table = Table("rank", "p", "up to it", "", "heads that reach it", title=title, box=box.SIMPLE)
    for rank, probability, mass, reached in zip(
        found.ranks, found.probability, found.cumulative, found.reached, strict=True
    ):
        table.add_row(f"{rank:,}", f"{probability:.2g}", f"{mass:.4f}", bar(min(mass, 1.0)), f"{reached:.1%}")
    console.print(table)


def render_sample(console: Console, view: SampleView, pieces: Pieces | None) -> None:
    """One line per position: the token, how probable the next one was, and what the teacher preferred."""
    table = Table(
        title=f"sample {view.index} ({view.id}): {len(view.rows):,} of {view.length:,} tokens",
        caption="p(next): the teacher's probability of the next line's token; *: a student learns the token",
        box=box.SIMPLE,
    )
    for name in ("", "*", "token", "p(next)", "head", "entropy"):
        table.add_column(name, no_wrap=True, max_width=16)
    # The only column that gives way where the terminal is narrow.
    table.add_column("the teacher's best")
    for row in view.rows:
        best = "  ".join(f"{shown(token, pieces)} {p:.2f}" for token, p in row.best)
        numbers = (row.probability, row.head_mass, row.entropy)
        table.add_row(
            str(row.position),
            "*" if row.learned else "",
            Text(shown(row.token, pieces)),
            *("" if number is None else f"{number:.3f}" for number in numbers),
            Text(best, no_wrap=True, overflow="ellipsis"),
        )
    console.print(table)


def sample_json(view: SampleView, pieces: Pieces | None) -> dict[str, Any]:
    """The view as JSON, with the text of each token (null where it is not known)."""
    rows = []
    for row in view.rows:
        best = [{"token": token, "text": text_of(token, pieces), "probability": p} for token, p in row.best]
        rows.append(
            {
                "position": row.position,
                "token": row.token,
                "text": text_of(row.token, pieces),
                "learned": row.learned,
                "next_token": row.next_token,
                "probability": row.probability,
                "best": best,
                "head_mass": row.head_mass,
                "entropy": row.entropy,
            }
        )
    return {"index": view.index, "id": view.id, "length": view.length, "rows": rows}


def text_of(token: int, pieces: Pieces | None) -> str | None:
    """A token's text, None where it is not known."""
    return (pieces(token) if pieces else "") or None


def shown(token: int, pieces: Pieces | None) -> str:
    """A token's text in quotes, control characters escaped, or the id where there is none."""
    text = text_of(token, pieces)
    return str(token) if text is None else repr(text)
