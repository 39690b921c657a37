"""How the blocks of a student ended that were trained one by one before the whole."""

from __future__ import annotations

from distily.html.page import Cell, Html, note, section, table
from distily.units import duration, number
from student.report.files import RunFiles, number_in, rows_in

HEADER = ("block", "student's layers", "teacher's states", "as rounded", "as trained")


def blocks_section(run: RunFiles) -> Html:
    """A row for each block; nothing where there were none."""
    rows = block_rows(run)
    return section("Blocks", note(blocks_words(run)), table(HEADER, rows)) if rows else Html("")


def block_rows(run: RunFiles) -> list[tuple[Cell, ...]]:
    """Number, layers of the student, layer of the teacher's states, and both errors of each block."""
    rows: list[tuple[Cell, ...]] = []
    for place, block in enumerate(rows_in(run.summary, "blockwise", "blocks"), 1):
        layers = block.get("layers")
        shown = [str(layer) for layer in layers] if isinstance(layers, list) else []
        ends = "-".join(dict.fromkeys([*shown[:1], *shown[-1:]]))
        errors = (number_in(block, "error_before"), number_in(block, "error_after"))
        rows.append((str(place), ends, number_in(block, "target"), *errors))
    return rows


def blocks_words(run: RunFiles) -> str:
    """What the numbers are, in sentences."""
    found = run.summary.get("blockwise")
    known = found if isinstance(found, dict) else {}
    steps, seconds = number_in(known, "steps"), number_in(known, "seconds")
    said = f" in {number(steps)} steps each" if steps is not None else ""
    said += f", {duration(seconds)} for all" if seconds is not None else ""
    measured = known.get("measured_on")
    on = f" on {measured}" if isinstance(measured, str) else ""
    given = "the teacher's" if known.get("inputs") == "teacher" else "those of the blocks before"
    return (
        f"Before the whole student, its blocks were trained one by one{said}, to give the teacher's cached "
        f"states from {given}. Errors are squared differences to the teacher's states relative to their "
        f"squares{on}, of the ternary block."
    )
