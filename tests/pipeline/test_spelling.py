"""Underscores and switches with a value mean what dashes and bare switches mean."""

from __future__ import annotations

import pytest
import typer

from pipeline.cli import app
from pipeline.cli.spelling import spelled

COMMAND = typer.main.get_command(app)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("--teacher_load_in_8bit True", "--teacher-load-in-8bit"),
        ("--teacher-load-in-8bit false --top_k 8", "--top-k 8"),
        ("--teacher_load_in_4bit=True", "--teacher-load-in-4bit"),
        ("--pack False", "--no-pack"),
        ("--no_pack", "--no-pack"),
        ("--teacher-load-in-8bit my_teacher true.txt", "--teacher-load-in-8bit my_teacher true.txt"),
        ("--out my_store --text_column=my_text", "--out my_store --text-column=my_text"),
        ("-v --json -- --my_file true", "-v --json -- --my_file true"),
    ],
)
def test_spellings(given: str, meant: str) -> None:
    assert spelled(given.split(), COMMAND) == meant.split()
