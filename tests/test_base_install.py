"""Without torch, vLLM and Hugging Face's libraries stores are read and checked; the rest names its extra."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.student.caches import random_samples, save_teacher, write_cache
from tests.student.conftest import SPECS

# Names that the base install lacks are blocked; the command then runs as its console script does.
PROGRAM = """
import sys
for name in "torch vllm transformers datasets huggingface_hub accelerate safetensors yaml".split():
    sys.modules[name] = None
from {module} import main
main()
"""


def run(program: str, *words: object) -> subprocess.CompletedProcess[str]:
    module = {"distily-cache": "pipeline.cli", "distily-train": "student.cli"}[program]
    command = [sys.executable, "-c", PROGRAM.format(module=module), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    return write_cache(path / "store", save_teacher(path / "teacher"), random_samples(12, 199), SPECS)


def test_a_store_is_looked_after(store: Path, tmp_path: Path) -> None:
    for words in (
        ("verify", store, "--deep"),
        ("info", store),
        ("report", store, "--out", tmp_path / "page.html"),
    ):
        done = run("distily-cache", *words)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "page.html").is_file()


@pytest.mark.parametrize(
    ("words", "extra"),
    [
        (("distily-cache", "generate", "{teacher}", "{store}", "--out", "x"), "[generate] or [generate-cpu]"),
        (("distily-train", "from-cache", "{store}", "--output-dir", "x"), "[train]"),
        (("distily-train", "export", "{store}", "--format", "gguf"), "[train]"),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else "",
)
def test_what_needs_more_names_the_extra(store: Path, words: tuple[str, ...], extra: str) -> None:
    program, *rest = (word.format(store=store, teacher=store.parent / "teacher") for word in words)
    done = run(program, *rest)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"{program}: this needs the package ") and extra in done.stderr
