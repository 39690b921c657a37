"""`distily-train card DIR`: the model card of a finished training, README.md."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from blake3 import blake3

from distily.html.page import why_not, write
from student.card.metadata import check, metadata
from student.card.page import card_page
from student.card.plots import write_plots
from student.errors import UserError
from student.report.files import read_run

CARD = "README.md"
# Ends a card: the hash of what stands above it tells whether somebody has edited it since.
_MARK = re.compile(r"<!-- distily-train card ([0-9a-f]{32}) -->\n\Z")
# Trainer's own card, which --push-to-hub writes, until its reader has completed it.
_TRAINERS = "<!-- This model card has been generated automatically according to the information the Trainer"


def card(
    directory: Path, license: str | None = None, languages: Sequence[str] = (), overwrite: bool = False
) -> Path:
    """Write README.md and its pictures into `directory`, in place of those there; the card's path.

    Raises UserError for what is no finished training, a licence or language that is not spelled as the hub
    does, a directory that cannot be written, and a README.md that somebody has edited unless `overwrite`.
    """
    check(license, languages)
    run, file = read_run(directory), directory / CARD
    if problem := why_not(file):
        raise UserError(f"{file} {problem}")
    if not overwrite and edited(file):
        raise UserError(
            f"{file} was edited, or written by something else; move it away, or replace it with --overwrite"
        )
    data = metadata(run, license, languages)
    page = card_page(run, data, write_plots(run))
    write(file, f"{page}\n<!-- distily-train card {_digest(page)} -->\n")
    return file


def edited(file: Path) -> bool:
    """Whether `file` is there and is not, to the letter, what this command wrote."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return False
    found = _MARK.search(text)
    if found is None:
        return bool(text.strip()) and _TRAINERS not in text
    return _digest(text[: found.start()].removesuffix("\n")) != found[1]


def _digest(page: str) -> str:
    return blake3(page.encode("utf-8", "replace")).hexdigest(length=16)
