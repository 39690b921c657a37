"""The figures of docs/choosing.md are those of the studies that it names."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Row of the page: file, row there, (column on the page, column there, digits that the page keeps).
ROWS = {
    "`--top-k 50`": ("store_size.md", "fixed", [(1, 3, None), (2, 7, None), (3, 9, None)]),
    "`--top-k 12 --top-p 0.7 --tail 16` (default)": (
        "store_size.md",
        "default",
        [(1, 3, None), (2, 7, None), (3, 9, None)],
    ),
    "`--top-k 8 --top-p 0.5 --tail 12`": (
        "store_size.md",
        "small",
        [(1, 3, None), (2, 7, None), (3, 9, None)],
    ),
    "`--top-k 1 --tail 16`": (
        "store_size.md",
        "draws only (k=1) | k=1 + 16 draws",
        [(1, 3, None), (2, 4, None)],
    ),
    "`--top-k 1 --tail 48`": (
        "store_size.md",
        "draws only (k=1) | k=1 + 48 draws",
        [(1, 3, None), (2, 4, None)],
    ),
    "`--top-k 16 --top-p 0.8 --tail 24`": (
        "store_size.md",
        "head p=0.8, k≤16, and draws | p=0.8, k≤16 + 24",
        [(1, 3, None), (2, 4, None)],
    ),
    "`--final`, full KL": ("kd_quality.md", "cache, `--final`", [(1, 2, 3)]),
    "the default, with 16 draws": ("kd_quality.md", "cache, default", [(1, 2, 3)]),
    "top-50, one bucket": ("kd_quality.md", "top-50, one bucket", [(1, 2, 3)]),
    "top-12, one bucket": ("kd_quality.md", "top-12, one bucket", [(1, 2, 3)]),
    "top-12, nothing for the rest": ("kd_quality.md", "top-12 and nothing", [(1, 2, 3)]),
    **{
        f"`--hidden-dtype {dtype}`": (
            "hidden_bytes.md",
            f"{dtype} |",
            [(3, 2, None), (4, 3, None), (5, 7, None), (6, 8, None)],
        )
        for dtype in ("bf16", "int8", "fp8", "int4", "int2")
    },
    "labels alone": ("kd_quality.md", "labels alone", [(1, 2, 3)]),
}


def cells(text: str, start: str) -> list[str]:
    """The cells of the first line of a table that starts so."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize("row", ROWS)
def test_figures(row: str) -> None:
    page = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    file, there, columns = ROWS[row]
    result = (ROOT / "benchmarks" / "results" / file).read_text(encoding="utf-8")
    for own, theirs, digits in columns:
        expected = cells(result, there)[theirs]
        if digits is not None:
            expected = " ± ".join(f"{float(number):.{digits}f}" for number in expected.split(" ± "))
        assert cells(page, row)[own] == expected
