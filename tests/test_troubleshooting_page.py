"""docs/troubleshooting.md quotes error lines that the product has."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
QUOTES = re.findall(r"^> (.+)$", PAGE, flags=re.M)


@cache
def texts() -> str:
    """Every string of the three packages, a placeholder as …, one a line."""
    found = set()
    for file in (
        file
        for package in ("distily", "featurestore", "pipeline", "student")
        for file in (ROOT / package).rglob("*.py")
    ):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (str(p.value) if isinstance(p, ast.Constant) else "…" for p in node.values)
                found.add("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return "\n".join(" ".join(text.split()) for text in found)


@pytest.mark.parametrize("quote", QUOTES, ids=lambda quote: quote[:40])
def test_the_line_exists(quote: str) -> None:
    plain = re.sub(r"\\(.)", r"\1", quote)
    pieces = [piece for piece in plain.split("…") if piece.strip()]
    assert sum(map(len, pieces)) >= 12, "too little to recognise"
    assert re.search(".*".join(map(re.escape, pieces)), texts()), plain


def test_there_are_lines() -> None:
    assert len(QUOTES) > 20
