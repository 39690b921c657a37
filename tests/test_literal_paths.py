"""Names with brackets, stars, dashes and line feeds go through every command, and are shown, as they are; a
line feed is shown as an escape where a line is one line.
"""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from distily.text import printable
from pipeline.progress import ConsoleReporter
from student.evaluation.show import show
from tests.command import cli, generate

NAMES = ("x [/x]", "[bold]y", "a*b?[1]", "-dash", "two\nlines", "plain [red]z[/red]", ":warning: w")


@pytest.mark.parametrize("name", NAMES)
def test_a_store_at_any_path(tiny_teacher: Path, tmp_path: Path, name: str) -> None:
    data = tmp_path / "in" / name / "data.jsonl"
    data.parent.mkdir(parents=True)
    data.write_text(json.dumps({"text": f"the teacher learns of {name}"}))
    store = tmp_path / "out" / name
    made = generate(tiny_teacher, data, store)
    assert made["samples"] == 1 and store.is_dir()
    flat = "".join(str(store).split())
    code, out, err = cli("generate", tiny_teacher, data, "--out", store, "--engine", "transformers")
    assert code == 0
    for path in (store, data):
        assert "".join(printable(str(path)).split()) in "".join(err.split())
    for command in ("info", "verify", "ls", "gc"):
        code, out, err = cli(command, store)
        assert code == 0, err
        if command == "info":
            shown = "".join(char for char in out if not char.isspace() and char not in "│┃")
            assert flat in shown or len(flat) > 60
    page = tmp_path / "page [x].html"
    code, out, err = cli("report", store, "--out", page)
    assert code == 0 and page.is_file() and str(page) in out


def test_other_teacher_names_are_shown_as_they_are(tiny_teacher: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher [t] [bold]x"
    shutil.copytree(tiny_teacher, teacher)
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"text": "the teacher learns of a student"}))
    store = tmp_path / "store"
    generate(teacher, data, store)
    code, out, err = cli("info", store)
    assert code == 0, err
    assert "teacher[t][bold]x" in "".join(char for char in out if not char.isspace() and char not in "│┃")


def test_stages_are_shown_as_they_are() -> None:
    text = "tokenising /data [v1]/[/x] [bold]b :warning:"
    for terminal in (False, True):
        console = Console(file=io.StringIO(), force_terminal=terminal, color_system=None, width=200)
        with ConsoleReporter(console) as report:
            report.stage(text)
        assert text in console.file.getvalue()  # type: ignore[attr-defined]


def test_an_evaluation_shows_names_as_they_are() -> None:
    console = Console(file=io.StringIO(), width=200)
    side = {"perplexity": 2.0, "bits_per_byte": 1.0}
    texts = [{"name": "a [/x] [bold]b", "tokens": 3, "student": side, "teacher": None}]
    numbers = dict.fromkeys(
        ("ce", "perplexity", "kl", "reverse_kl", "top1_agreement", "calibration_error"), 1.0
    )
    cache = {
        "path": "store [/x]",
        "positions": 1,
        "samples": 1,
        "exactness": {},
        "student": numbers,
        "teacher": numbers,
        "by_position": [],
        "by_entropy": [],
    }
    task = {
        "task": "t [/x]",
        "metric": "m [y]",
        "filter": "f[z]",
        "samples": 1,
        "student": 1.0,
        "student_stderr": None,
        "teacher": None,
        "teacher_stderr": None,
    }
    show({"cache": cache, "texts": texts, "tasks": [task]}, console)
    out = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(name in out for name in ("store [/x]", "a [/x] [bold]b", "t [/x]", "m [y] (f[z])"))
