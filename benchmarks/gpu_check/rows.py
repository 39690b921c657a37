"""The rows of the report: the name of each, by the section that measures it, in the order of the tables."""

from __future__ import annotations

from dataclasses import dataclass, replace

AGREEMENT = "features of vLLM and of transformers"
PREFILL = "vLLM's prefill alone"
HEAD_PRODUCT = "the LM head's product alone"
CAPTURE = "a capture, default request, committed"

STUDENTS = ("full precision", "ternary", "ternary, int8 backward")
LABELS_OF_TRANSFORMERS = "labels, loss of transformers"
LABELS = "labels, fused head"
KL = "cache: forward KL"
HIDDEN = "cache: forward KL, a hidden layer"
DENSE = "cache: KL over the whole vocabulary (--final)"
LIVE = "live teacher: KL over the whole vocabulary"
OBJECTIVES = (LABELS_OF_TRANSFORMERS, LABELS, KL, HIDDEN, DENSE, LIVE)

FUSED_KL = "ours, forward KL of 28 columns"
FUSED_CE = "ours, cross-entropy"
CUT_CROSS_ENTROPY = "cut-cross-entropy"
LIGER = "Liger"
HEADS = (FUSED_KL, FUSED_CE, CUT_CROSS_ENTROPY, LIGER)

_BETWEEN = " | "


def joined(first: str, second: str) -> str:
    """The name of a row that two things make."""
    return f"{first}{_BETWEEN}{second}"


def parts(row: str) -> tuple[str, str]:
    """What `joined` joined."""
    first, _, second = row.partition(_BETWEEN)
    return first, second


MACHINE, TEACHER, CACHE = "machine", "teachers", "cache"


@dataclass(frozen=True, kw_only=True)
class Section:
    """Rows that one module measures, in one process until one fails, or each in its own if `apart`.

    needs: of another section, rows without which none of these can be had. seconds: for one row, at most.
    """

    name: str
    rows: tuple[str, ...]
    seconds: float
    apart: bool = False
    needs: tuple[str, ...] = ()


def sections(vocabularies: tuple[int, ...]) -> tuple[Section, ...]:
    """All of them, in the order in which they run."""
    steps = tuple(joined(student, objective) for student in STUDENTS for objective in OBJECTIVES)
    heads = tuple(joined(f"{vocabulary:,}", head) for vocabulary in vocabularies for head in HEADS)
    return (
        Section(name="prepare", rows=(MACHINE, TEACHER, CACHE), seconds=150),
        Section(name="train", rows=steps, seconds=120, needs=(TEACHER, CACHE)),
        Section(name="head", rows=heads, seconds=120),
        # Apart, because a vLLM that ends does not give all memory back at once.
        Section(
            name="capture",
            rows=(PREFILL, HEAD_PRODUCT, CAPTURE, AGREEMENT),
            seconds=150,
            apart=True,
            needs=(TEACHER,),
        ),
    )


def processes(parts: tuple[Section, ...], *, together: bool) -> list[Section]:
    """What runs in one process each.

    together: all rows in one, which spares a CPU most of what starting Python and its libraries takes.
    """
    if together:
        everything = tuple(row for section in parts for row in section.rows)
        return [Section(name="all", rows=everything, seconds=max(section.seconds for section in parts))]
    found = []
    for section in parts:
        rows = [(row,) for row in section.rows] if section.apart else [section.rows]
        found += [replace(section, rows=chosen) for chosen in rows]
    return found
