"""One small cache and one way to run the command, shared by the training tests."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from distily.system.machine import CACHE_VARIABLE
from featurestore.format.schema import HiddenSpec, LogitsSpec
from student.cli import main
from student.config import precision
from tests.command import call
from tests.student.caches import put_head, random_samples, save_teacher, write_cache
from tests.student.exports import Export, Students, save

SPECS = [LogitsSpec(16), HiddenSpec(1, "bf16"), HiddenSpec(3, "f32")]


@pytest.fixture(scope="session", autouse=True)
def trains_in_float32(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests compare numbers of float32, whatever this machine does fast: what it was measured at says so."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("machine")))
        with pytest.MonkeyPatch.context() as slow:
            slow.setattr(
                torch.nn.functional,
                "linear",
                lambda left, _: time.sleep(8e-3 if left.dtype == torch.bfloat16 else 1e-3),
            )
            assert precision.product_times()["bfloat16"] > 8e-3
        yield


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the teacher that `cache` is of."""
    return save_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    """36 samples of the teacher: its 16 best logits, hidden states 1 (bf16) and 3 (f32, after the
    final norm).
    """
    path = tmp_path_factory.mktemp("cache") / "store"
    return write_cache(path, teacher, random_samples(36, 199), SPECS)


@pytest.fixture(scope="module")
def full_store(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    """A cache of 12 samples with final states and the teacher's head."""
    path = tmp_path_factory.mktemp("full") / "store"
    write_cache(path, teacher, random_samples(12, 199), [LogitsSpec(16), HiddenSpec(3, "f32")])
    put_head(path, teacher)
    return path


@pytest.fixture
def eager() -> Iterator[None]:
    """transformers compiles its BitNet quantisers; compiling takes longer than these tests."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="session")
def students(tmp_path_factory: pytest.TempPathFactory) -> Students:
    """A saved BitNet student of a model type with changes of its configuration; made once."""
    made: dict[str, Path] = {}

    def get(model_type: str, **changes: Any) -> Path:
        key = repr((model_type, sorted(changes.items())))
        if key not in made:
            made[key] = save(tmp_path_factory.mktemp("student"), model_type, **changes)
        return made[key]

    return get


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Path]:
    """The output of one training step on `cache`, with a quarter held out; not to be written to."""
    path = tmp_path_factory.mktemp("trained") / "student"
    shape = ["--student-model-config", '{"num_hidden_layers": 1}']
    flags = [*shape, "--eval-fraction", 0.25, "--max-steps", 1, "--report-to", "none", "--json"]
    call("distily-train", "from-cache", cache, "--output-dir", path, *flags)
    files = sorted(path.rglob("*"))
    yield path
    assert sorted(path.rglob("*")) == files, "a test wrote into the student that all tests share"


@pytest.fixture
def student(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained student, to write into."""
    return Path(shutil.copytree(trained, tmp_path / "student"))


@pytest.fixture
def distily(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs `distily-train ARGS` in this process; (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["distily-train", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capfd.readouterr()
        return int(stop.value.code or 0), out, err

    return run


@pytest.fixture
def export(distily: Callable[..., tuple[int, str, str]], tmp_path: Path) -> Export:
    """Runs a successful `distily-train export`; its report."""

    def run(student: Path, format: str, *arguments: object) -> dict[str, Any]:
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        code, printed, err = distily(
            "export", student, "--format", format, "--out", out, "--json", *arguments
        )
        assert code == 0, err
        assert "%|" not in err  # a progress bar
        report: dict[str, Any] = json.loads(printed)
        return report

    return run


@pytest.fixture
def refused(distily: Callable[..., tuple[int, str, str]]) -> Callable[..., str]:
    """Runs a request that has to be refused with exit code 2; its one line on standard error."""

    def run(*arguments: object) -> str:
        code, out, err = distily(*arguments)
        lines = [line for line in err.splitlines() if line.startswith("distily-train: ")]
        assert (code, out, len(lines)) == (2, "", 1), err
        return lines[0]

    return run


@pytest.fixture
def distily_train(
    distily: Callable[..., tuple[int, str, str]],
) -> Callable[..., tuple[int, str, str]]:
    """Runs `distily-train from-cache ARGS` in this process; (exit code, stdout, stderr)."""

    return lambda *arguments: distily("from-cache", *arguments)


@pytest.fixture
def train(distily_train: Callable[..., tuple[int, str, str]], cache: Path) -> Callable[..., dict[str, Any]]:
    """Runs a successful training on `cache` with quick settings; the summary it prints."""

    def run(output_dir: Path, *arguments: object) -> dict[str, Any]:
        quick = ["--per-device-train-batch-size", 4, "--eval-fraction", 0.25, "--report-to", "none"]
        code, out, err = distily_train(cache, "--output-dir", output_dir, *quick, "--json", *arguments)
        assert code == 0, err
        summary: dict[str, Any] = json.loads(out)
        return summary

    return run
