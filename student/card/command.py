"""`distily-train card DIR`: the model card of a finished training, README.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from featurestore.page import why_not, write
from student.card.metadata import check, metadata
from student.card.page import card_page
from student.card.plots import write_plots
from student.errors import UserError
from student.report.files import read_run

CARD = "README.md"


def card(directory: Path, license: str | None = None, languages: Sequence[str] = ()) -> Path:
    """Write README.md and its pictures into `directory`, in place of those there; the card's path.

    Raises UserError for what is no finished training, a licence or language that is not spelled as the hub
    does, and a directory that cannot be written.
    """
    check(license, languages)
    run, file = read_run(directory), directory / CARD
    if problem := why_not(file):
        raise UserError(f"{file} {problem}")
    data = metadata(run, license, languages)
    write(file, card_page(run, data, write_plots(run)))
    return file
