"""`make gpu-check`: at toy sizes everything runs on a CPU; what fails, hangs or dies loses its row alone."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "gpu.md"


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of benchmarks/gpu_check by its name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))

    def load(name: str) -> ModuleType:
        return importlib.import_module(f"gpu_check.{name}")

    return load


@pytest.mark.vllm
@pytest.mark.gpu_check
@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_toy_sizes_run_on_a_cpu(part: Any, tmp_path: Path) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    (tmp_path / "venv" / ".ready").touch()
    before = RESULT.stat().st_mtime_ns if RESULT.exists() else None
    words = ["make", "gpu-check", "SIZE=toy", f"VENV={tmp_path / 'venv'}", f"RUN={tmp_path / 'run'}"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    folder = tmp_path / "run" / "gpu-check"
    page = (folder / "report.md").read_text()
    assert done.returncode == 0, page + done.stderr[-2000:]
    assert page in done.stdout
    assert "failed" not in page and "Toy sizes" in page
    assert before == (RESULT.stat().st_mtime_ns if RESULT.exists() else None)
    rows, sizes = part("rows"), part("sizes")
    sections = {section.name: section.rows for section in rows.sections(sizes.TOY.vocabularies)}
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines()]
    for row in (*sections["train"], *sections["head"]):
        line = next(line for line in cells if line[:2] == list(rows.parts(row)))
        assert "ms" in line[2] or line[2] == "not installed", line
    for row in (rows.PREFILL, rows.HEAD_PRODUCT, rows.CAPTURE):
        assert float(next(line for line in cells if line[0] == row)[1].replace(",", "")) > 0
    assert "the engines agree" in page
    records = part("processes").read(folder / "toy.jsonl")
    objectives = [records[rows.joined(rows.STUDENTS[0], name)] for name in (rows.DENSE, rows.LIVE)]
    # The same objective on the same weights, once with stored states, which have 8 bits.
    assert objectives[0]["first_loss"] == pytest.approx(objectives[1]["first_loss"], rel=0.05)
    assert objectives[0]["first_loss"] != objectives[1]["first_loss"]


SECTION = """
import os, sys, time
from pathlib import Path
from gpu_check.processes import measure_rows

def measure(row):
    if row == "wrong": raise ValueError("a line | of two\\nlines")
    if row == "dies": print("Segmentation fault"); sys.stdout.flush(); os._exit(3)
    if row == "hangs": time.sleep(60)
    return {"process": os.getpid()}

sys.exit(measure_rows(sys.argv[2:], measure, Path(sys.argv[1])))
"""


def test_rows_fail_alone(part: Any, tmp_path: Path) -> None:
    processes = part("processes")
    results = tmp_path / "results.jsonl"

    def run(names: list[str], seconds: float = 30) -> dict[str, Any]:
        processes.run_rows(
            [sys.executable, "-c", SECTION, str(results)],
            names,
            results,
            log=tmp_path / "section.log",
            seconds=seconds,
            deadline=time.monotonic() + seconds,
            environment=os.environ | {"PYTHONPATH": f"{ROOT / 'benchmarks'}{os.pathsep}{ROOT}"},
        )
        return dict(processes.read(results))

    found = run(["first", "wrong", "second", "dies", "third", "fourth"])
    assert found["wrong"] == {"failed": "ValueError: a line | of two lines"}
    assert found["dies"]["failed"] == "ended with exit code 3: Segmentation fault"
    assert found["third"] == found["fourth"] and len(found) == 6
    assert len({found[row]["process"] for row in ("first", "second", "third")}) == 3
    began = time.monotonic()
    found = run(["hangs", "late"], seconds=1.5)
    assert time.monotonic() - began < 20
    assert found["hangs"]["failed"].startswith("no result within 2 s")
    assert found["late"] == {"failed": "not begun: the time was over"}


def test_the_report_judges_what_was_measured(part: Any) -> None:
    report, rows = part("report"), part("rows")
    sections = rows.sections((1000,))
    step = {"waited": 0.0, "tokens": 8, "bytes": 2**30, "launches": 9.0, "waits": 2.0}
    head = {"launches": 5, "waits": 0, "positions": 4, "width": 2}
    found = {row: {"seconds": 2.0} | step for row in sections[1].rows}
    kl = [rows.joined(student, rows.KL) for student in rows.STUDENTS]
    found[kl[0]]["seconds"], found[kl[1]]["seconds"] = 2.04, 2.2
    found[kl[2]] = {"failed": "OutOfMemoryError: 3 | 4"}
    found |= {rows.MACHINE: machine(), rows.TEACHER: {}, rows.CACHE: {"tokens": 1}}
    agreed = {"positions": 3, "teacher": "random", "dtype": "bfloat16"}
    found[rows.AGREEMENT] = {"agrees": False, "differences": {"lse": [0.5, 0.1]}} | agreed
    for row, seconds in ((rows.PREFILL, 3.0), (rows.HEAD_PRODUCT, 1.0), (rows.CAPTURE, 4.4)):
        found[row] = {"seconds": seconds, "tokens": 44, "bytes": 2**20}
    found |= {row: {"seconds": 1.0, "bytes": 100} | head for row in sections[2].rows}
    found[rows.joined("1,000", rows.CUT_CROSS_ENTROPY)] |= {"seconds": 0.8, "bytes": 80}
    found[rows.joined("1,000", rows.LIGER)] = {"absent": "not installed"}
    goals = report.goals(found, sections[2].rows)
    kept = [(goal.ratio and round(goal.ratio, 2), goal.kept) for goal in goals]
    assert kept == [(0.91, True), (1.02, True), (1.1, False), (None, None), (1.25, True), (1.25, False)]
    page = report.page(found, sections, toy=False)
    assert (
        "Acme (80 GiB, compute capability 9.0), driver 580.1, CUDA 13.0" in page
        and "abc with changes" in page
    )
    assert "| a capture's tokens/s, of prefill and LM head | 0.91 | ≥ 0.9 | yes |" in page
    assert "do not agree" in page and "| 1,000 | Liger | not installed |" in page
    assert "failed: OutOfMemoryError: 3 / 4" in page
    assert set(report.failures(found, sections)) == {kl[2], rows.AGREEMENT}
    assert rows.PREFILL in report.failures({}, sections)
    assert "not measured" in report.page({}, sections, toy=False)
    widths = {line.count("|") for line in page.split("## Training steps")[1].splitlines() if line[:1] == "|"}
    assert len(widths) <= 3  # of three tables


def machine() -> dict[str, Any]:
    gpu = {"gpu": "Acme", "bytes": 80 * 2**30, "capability": "9.0", "driver": "580.1", "cuda": "13.0"}
    return {"cpu": "x86", "cores": 2, "python": "3.11", "torch": "2.13.0", "commit": "abc with changes"} | gpu


def test_launches_and_waits_are_told_apart(part: Any) -> None:
    counts = {
        "cudaLaunchKernel": 5,
        "cudaLaunchKernelExC": 2,
        "cuLaunchKernelEx": 1,
        "cudaStreamSynchronize": 3,
        "cudaDeviceSynchronize": 1,
        "cudaMemcpyAsync": 7,
        "cudaMemcpy": 1,
        "aten::add": 40,
    }
    assert part("measuring").count_calls(counts) == (8, 4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(part: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert part("__main__").check("gpu") == 2
    assert capsys.readouterr().err.splitlines() == [
        "gpu-check: torch sees no GPU; make gpu-check SIZE=toy runs toy sizes on the CPU"
    ]
