"""The frame of every report: one HTML page that needs no network, no other file, and no script to be read.

Pure functions, data in and text out, but for `why_not` and `write`. What is not `Html` already is escaped,
wherever it comes from. Charts are in distily.html.chart.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from distily.html.sorting import SCRIPT, SORTABLE, SOURCE
from distily.html.style import STYLE
from distily.system.files import write_whole
from distily.text import printable
from distily.units import number

Cell = str | float | int | None


# By which a page of ours is known, of any version.
_START = (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
    "style-src 'unsafe-inline'"
)


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def html(value: Cell) -> Html:
    """`value` as HTML: text escaped, numbers as people write them, None as a dash.

    Controls, and marks that turn the text beside them around, are shown as escapes.
    """
    if isinstance(value, Html):
        return value
    return Html(escape(printable(value, keep="\n\t") if isinstance(value, str) else number(value)))


def page(title: str, *parts: Html) -> str:
    """The whole document. Its policy forbids the browser to load anything, or to run more than `SCRIPT`."""
    body = "".join(parts)
    sorts = f'<table class="{SORTABLE}"' in body
    policy = f'; script-src {SOURCE}">' if sorts else '">'
    script = f"<script>{SCRIPT}</script>" if sorts else ""
    return (
        f"{_START}{policy}<title>{html(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><main><h1>{html(title)}</h1>\n{body}</main>{script}</body></html>\n"
    )


def why_not(file: Path) -> str:
    """Why a page cannot be written to `file`, "" where nothing speaks against it."""
    if file.is_dir():
        return "is a directory; name a file in it"
    folder = file.absolute().parent
    if not folder.is_dir():
        return f"lies in {folder}, which is no directory; make it first"
    writable = os.access(file if file.exists() else folder, os.W_OK)
    return "" if writable else "cannot be written; choose another"


def why_not_page(file: Path) -> str:
    """As `why_not`; a file that is there has to be an earlier page, or empty."""
    if problem := why_not(file):
        return problem
    if not file.is_file():
        return ""
    with file.open("rb") as stream:
        start = stream.read(len(_START.encode()))
    return "" if start in (b"", _START.encode()) else "is there already and is no report; choose another"


def write(file: Path, text: str) -> None:
    """Write a page; what UTF-8 cannot hold (half a surrogate pair in a name) becomes a question mark."""
    write_whole(file, text, errors="replace")


def section(heading: str, *parts: Html) -> Html:
    """A heading and what is under it; nothing at all where every part is empty."""
    body = "\n".join(filter(None, parts))
    return Html(f"<section><h2>{html(heading)}</h2>\n{body}</section>\n" if body else "")


def paragraph(text: str) -> Html:
    """A sentence or a few."""
    return Html(f"<p>{html(text)}</p>")


def note(text: str) -> Html:
    """A remark in soft ink: what was sampled, what a number leaves out."""
    return Html(f'<p class="note">{html(text)}</p>')


def code(text: str) -> Html:
    """A command or a digest, on lines of its own."""
    return Html(f"<pre>{html(text)}</pre>")


def written(text: str) -> Html:
    """What a model wrote, as it stands, line breaks and all; for a cell of a table."""
    return Html(f'<span class="written">{html(text)}</span>')


def cards(figures: Iterable[tuple[str, Cell]]) -> Html:
    """Key figures: (label, value) each; those without a value are left out."""
    parts = [
        f"<div><b>{html(value)}</b><span>{html(label)}</span></div>"
        for label, value in figures
        if value is not None
    ]
    return Html(f'<div class="cards">{"".join(parts)}</div>' if parts else "")


def row(*parts: Html) -> Html:
    """Charts and small tables side by side, or below each other on a phone."""
    body = "\n".join(filter(None, parts))
    return Html(f'<div class="row">{body}</div>' if body else "")


def table(
    header: Sequence[str],
    rows: Iterable[Sequence[Cell]],
    caption: str = "",
    tall: bool = False,
    sortable: bool = False,
) -> Html:
    """A table that scrolls inside itself where the screen is narrow, and with `tall` also downwards; with
    `sortable` a click on a column's heading sorts it.

    The first cell of a row is its heading. Columns of numbers stand to the right. Nothing without rows.
    """
    texts = [[html(cell) for cell in cells] for cells in rows]
    if not texts:
        return Html("")
    right = [all(_is_amount(cells[index]) for cells in texts) for index in range(len(header))]
    head = "".join(
        f'<th scope="col"{_side(flag)}>{html(cell)}</th>' for cell, flag in zip(header, right, strict=True)
    )
    body = "".join(f"<tr>{_cells(cells, right)}</tr>\n" for cells in texts)
    top = f"<thead><tr>{head}</tr></thead>"
    style = SORTABLE if sortable else ""
    return _framed(style, caption, ", ".join(header), f"{top}<tbody>{body}</tbody>", tall)


def facts(rows: Iterable[tuple[str, Cell]], caption: str) -> Html:
    """A table of (name, value) that wraps rather than scrolls; those without a value are left out."""
    texts = [(html(name), html(value)) for name, value in rows if value is not None]
    body = "".join(f"<tr>{_cells(cells, (False, False))}</tr>" for cells in texts)
    return _framed("facts", caption, caption, f"<tbody>{body}</tbody>") if texts else Html("")


def _framed(style: str, caption: str, label: str, body: str, tall: bool = False) -> Html:
    title = f"<caption>{html(caption)}</caption>" if caption else ""
    return Html(
        f'<div class="scroll{" tall" if tall else ""}" role="region" tabindex="0" '
        f'aria-label="{html(caption or label)}"><table class="{style}">{title}{body}</table></div>'
    )


def _cells(cells: Sequence[Html], right: Sequence[bool]) -> str:
    first = f'<th scope="row"{_side(right[0])}>{cells[0]}</th>'
    rest = zip(cells[1:], right[1:], strict=True)
    return first + "".join(f"<td{_side(flag)}>{cell}</td>" for cell, flag in rest)


def _side(right: bool) -> str:
    return ' class="n"' if right else ""


def _is_amount(cell: str) -> bool:
    return re.fullmatch(r"–?|[-−+]?[\d.,]+([eGMk:/%×x ].{0,12})?", cell) is not None
