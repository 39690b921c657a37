"""`python -m gpu_check SIZE`: all sections, the report, and exit code 1 where a row failed."""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import sys
import time
from pathlib import Path

from common import RESULTS, ROOT, RUN

from distily.system.gpu import hidden_gpus
from gpu_check import report, rows, sizes
from gpu_check.processes import FAILED, Record, measure_rows, read, run_rows

FOLDER = RUN / "gpu-check"
MINUTES = {"gpu": 10, "toy": 30}  # a CPU has other things to do, too
_WRITING_SECONDS = 5.0
_MODULES = {"prepare": "prepare", "capture": "capture", "train": "training", "head": "head"}
_SETTINGS = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # what is forked from a process that knows a GPU cannot use it
    "TOKENIZERS_PARALLELISM": "false",
}
# A CPU spares itself a start of vLLM for each row, and most of its memory.
_ON_CPU = {"CUDA_VISIBLE_DEVICES": "", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(prog="gpu-check", description=__doc__)
    parser.add_argument("size", choices=sizes.NAMES)
    parser.add_argument("--rows", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    return measure(given.size, given.rows) if given.rows else check(given.size)


def measure(size: str, chosen: list[str]) -> int:
    """In a process of its own: measure these rows, but for those that need one that failed."""
    of_size, results = sizes.named(size), results_of(size)
    by_row = {row: section for section in sections_of(size) for row in section.rows}

    def one(row: str) -> Record:
        section, found = by_row[row], read(results)
        if lost := [name for name in section.needs if FAILED in found.get(name, {FAILED: ""})]:
            return {FAILED: f"not begun: {lost[0]} failed"}
        module = importlib.import_module(f"gpu_check.{_MODULES[section.name]}")
        record: Record = module.measure(row, of_size, FOLDER)
        return record

    return measure_rows(chosen, one, results)


def sections_of(size: str) -> tuple[rows.Section, ...]:
    return rows.sections((sizes.TOY if size == "toy" else sizes.GPU).vocabularies)


def results_of(size: str) -> Path:
    return FOLDER / f"{size}.jsonl"


def check(size: str) -> int:
    """Run every section, write the report."""
    if size == "gpu" and (problem := no_gpu()):
        sys.stderr.write(f"gpu-check: {problem}\n")
        return 2
    deadline = time.monotonic() + 60 * MINUTES[size] - _WRITING_SECONDS
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    sections = sections_of(size)
    for process in rows.processes(sections, together=size == "toy"):
        began = time.monotonic()
        run_rows(
            [sys.executable, "-m", "gpu_check", size, "--rows"],
            process.rows,
            results_of(size),
            log=FOLDER / f"{process.name}.log",
            seconds=process.seconds * MINUTES[size] / MINUTES["gpu"],
            deadline=deadline,
            environment=environment(size),
        )
        sys.stderr.write(f"gpu-check: {process.name}, {time.monotonic() - began:.0f} s\n")
    found = read(results_of(size))
    page = report.page(found, sections, toy=size == "toy")
    target = RESULTS / "gpu.md" if size == "gpu" else FOLDER / "report.md"
    target.write_text(page, encoding="utf-8")
    sys.stdout.write(page)
    failed = report.failures(found, sections)
    sys.stderr.write(f"gpu-check: {target}" + f"; {len(failed)} rows failed" * bool(failed) + "\n")
    return 1 if failed else 0


def environment(size: str) -> dict[str, str]:
    """Of the processes: they import from here and from the checkout."""
    paths = [str(ROOT / "benchmarks"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    path = {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return os.environ | _SETTINGS | path | (_ON_CPU if size == "toy" else {})


def no_gpu() -> str:
    """Why there is nothing to check; "" where torch sees a GPU."""
    import torch

    if torch.cuda.is_available():
        return ""
    hidden = hidden_gpus("make gpu-check SIZE=toy")
    return hidden or "torch sees no GPU; make gpu-check SIZE=toy runs toy sizes on the CPU"


if __name__ == "__main__":
    sys.exit(main())
