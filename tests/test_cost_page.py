"""docs/cost.md: its tables are what `plan` counts with, its times follow from the studies that it names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from featurestore.format.kinds.table import kind_of
from featurestore.format.schema import GroupSpec, HiddenSpec, LogitsSpec, LseSpec
from pipeline.generate.pace import rough_pace

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "cost.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results"
DEFAULT = LogitsSpec(12, 0.7, 16)
PARTS: dict[str, GroupSpec] = {
    "`--top-k 12 --top-p 0.7 --tail 16` (default)": DEFAULT,
    "`--top-k 8 --top-p 0.5 --tail 12`": LogitsSpec(8, 0.5, 12),
    "`--top-k 64`": LogitsSpec(64),
    "one of `--temperatures`": LseSpec(2.0),
    "one hidden layer, bf16": HiddenSpec(1, "bf16"),
    "one hidden layer, int8 or fp8": HiddenSpec(1, "int8"),
    "one hidden layer, int4": HiddenSpec(1, "int4"),
    "one hidden layer, int2": HiddenSpec(1, "int2"),
    "`--final`, klt6": HiddenSpec(1, "klt6"),
    "`--final`, klt4": HiddenSpec(1, "klt4"),
    "one hidden layer, f32": HiddenSpec(1, "f32"),
}
# What is stored; whether the LM head lies beside it once, in bf16.
CACHES: dict[str, tuple[list[GroupSpec], bool]] = {
    "default": ([DEFAULT], False),
    "default, temperatures 2 and 4": ([DEFAULT, LseSpec(2.0), LseSpec(4.0)], False),
    "default, 1 hidden layer int8": ([DEFAULT, HiddenSpec(1, "int8")], False),
    "default, 1 hidden layer int4": ([DEFAULT, HiddenSpec(1, "int4")], False),
    "default, 3 hidden layers int8": ([DEFAULT, *(HiddenSpec(i, "int8") for i in (1, 2, 3))], False),
    "default, `--final` bf16": ([DEFAULT, HiddenSpec(1, "bf16")], True),
    "default, `--final` int8": ([DEFAULT, HiddenSpec(1, "int8")], True),
}
TOKENS = (10**6, 10**8, 10**9)
TEACHERS = ((49_152, 576), (262_144, 4_096))


def table(heading: str) -> dict[str, list[str]]:
    """The rows of the table below a heading of the page, by their first cell."""
    section = PAGE.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if "|" in line
    ]
    return {row[0]: row[1:] for row in rows[2:]}


def size(count: float) -> str:
    """Three digits: 50.6 MB, 2.32 GB."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{float(f'{count / unit:.3g}'):g} {name}"
    raise AssertionError(count)


def row_bytes(spec: GroupSpec, hidden_size: int) -> float:
    return kind_of(spec).row_bytes(spec, hidden_size)


def test_bytes_of_a_token() -> None:
    expected = {
        name: [
            f"{count:,.4g}" if (count := row_bytes(spec, D)) < 1000 else f"{count:,.0f}" for _, D in TEACHERS
        ]
        for name, spec in PARTS.items()
    }
    assert table("Bytes of a token") == expected


def test_bytes_of_a_cache() -> None:
    found = table("Bytes of a cache")
    expected = {}
    for name, (specs, head) in CACHES.items():
        cells = []
        for V, D in TEACHERS:
            once = 2 * V * D if head else 0
            cells += [size(sum(row_bytes(spec, D) for spec in specs) * count + once) for count in TOKENS]
        expected[name] = cells
    assert found == expected


def test_hours_of_a_teacher() -> None:
    expected = {}
    for parameters, rate in ((135e6, 1e11), (7e9, 1e14), (7e9, 4e14), (70e9, 4e14)):
        pace = rough_pace(rate, int(parameters))
        name = f"{parameters / 1e9:g}B at {rate:.0e} operations/s".replace("e+", "e")
        expected[name] = [f"{float(f'{pace.seconds(count) / 3600:.2g}'):,g} h" for count in TOKENS]
    assert table("Hours") == expected


def test_break_even_follows_from_the_studies() -> None:
    capture = float(_cell("capture_speed.md", "(d) ours", 1))
    live, cache = (
        float(_cell("train_speed.md", row, 1).split()[0]) for row in ("live teacher", "cache: forward KL |")
    )
    saved = (live - cache) / 1024
    passes = 1 / capture / saved
    section = PAGE.split("\n## Break-even\n", 1)[1]
    for number in (
        f"{capture:.0f} tokens/s",
        f"{live:.2f} s",
        f"{cache:.2f} s",
        f"{1e3 / capture:.2f} ms",
        f"{1e3 * saved:.2f} ms",
        f"{passes:.1f} passes",
    ):
        assert number in section, number
    assert passes == pytest.approx(1.3, abs=0.05)


def _cell(file: str, row: str, column: int) -> str:
    """A cell of the one line of a result's table that starts so."""
    (line,) = re.findall(rf"^\| {re.escape(row)}.*$", (RESULTS / file).read_text(), flags=re.M)
    return [cell.strip() for cell in line.strip("|").split("|")][column]
