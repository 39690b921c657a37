"""Memory that runs out in the transformers engine: exit code 1, and one line that says what helps."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file

import pipeline.generate.passes
import pipeline.generate.run
from pipeline.cli import main
from pipeline.engines.memory import memory_for
from pipeline.errors import EngineError
from tests import teachers
from tests.pipeline.test_generate_cli import text_of

# Far more than a small run takes, far less than what is made to fail.
SPARE = 2**28
EMBEDDINGS = "model.embed_tokens.weight"


@pytest.fixture
def run_out() -> Iterator[Callable[[], None]]:
    """From the call on, this process gets `SPARE` bytes more of address space than it has then."""
    before = resource.getrlimit(resource.RLIMIT_AS)

    def limit() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + SPARE, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture
def fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs `distily-cache generate` over one long text, expects exit code 1 and gives the last line."""
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(json.dumps({"text": text_of(1500)}))

    def run(teacher: Path, *options: object) -> str:
        words = ("generate", teacher, corpus, "--out", tmp_path / "store", "--engine", "transformers")
        monkeypatch.setattr(sys, "argv", ["distily-cache", *map(str, (*words, *options))])
        with pytest.raises(SystemExit) as stop:
            main()
        stderr = capfd.readouterr().err
        assert stop.value.code == 1, stderr
        assert "Traceback" not in stderr
        return stderr.splitlines()[-1]

    return run


@pytest.fixture(scope="module")
def wide_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return teachers.llama(tmp_path_factory.mktemp("wide") / "teacher", vocab_size=100_003, positions=2048)


@pytest.mark.parametrize(
    ("stage", "options", "doing", "fix"),
    [
        # 1,500 x 100,003 logits of 4 bytes.
        ("start_engine", (), "running the teacher over a sample of 1,500 tokens", "lower --max-seq-len"),
        # The distributions of 160 texts, sorted in float64.
        (
            "start_writer",
            ("--continuations", 160, "--prompt-tokens", 2, "--max-num-batched-tokens", 50_000),
            "writing 160 texts together",
            "lower --max-num-batched-tokens",
        ),
    ],
)
def test_at_work(
    fail: Callable[..., str],
    run_out: Callable[[], None],
    wide_teacher: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    options: tuple[object, ...],
    doing: str,
    fix: str,
) -> None:
    module = pipeline.generate.passes if stage == "start_engine" else pipeline.generate.run
    start = getattr(module, stage)

    def started(*arguments: Any) -> Any:
        model = start(*arguments)
        run_out()
        return model

    monkeypatch.setattr(module, stage, started)
    line = fail(wide_teacher, *options)
    assert line.startswith(f"distily-cache: out of memory while {doing} (")
    assert "you tried to allocate" in line and fix in line


def test_at_samples_that_are_taken_together(
    fail: Callable[..., str],
    run_out: Callable[[], None],
    wide_teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """3 x 500 x 100,003 logits of 4 bytes."""
    start = pipeline.generate.passes.start_engine

    def started(*arguments: Any) -> Any:
        engine = start(*arguments)
        run_out()
        return engine

    monkeypatch.setattr(pipeline.generate.passes, "start_engine", started)
    texts = [json.dumps({"text": text_of(size)}) for size in (500, 499, 498)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(texts))
    line = fail(wide_teacher, "--max-num-batched-tokens", 4096, "--shard-tokens", 4096)
    running = "running the teacher over 3 samples of up to 500 tokens together"
    assert line.startswith(f"distily-cache: out of memory while {running} (")
    assert "lower --max-num-batched-tokens; or lower --max-seq-len" in line


def test_while_loading(
    fail: Callable[..., str],
    run_out: Callable[[], None],
    tiny_teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A checkpoint of 512 MiB, most of it a hole in the file."""
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    for file in tiny_teacher.glob("*.json"):
        (teacher / file.name).write_bytes(file.read_bytes())
    rows, size = 2**21, 2**29
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(config | {"vocab_size": rows}))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, weight in load_file(tiny_teacher / "model.safetensors").items():
        if name != EMBEDDINGS:
            end = len(data) + weight.nbytes
            header[name] = {"dtype": "F32", "shape": weight.shape, "data_offsets": [len(data), end]}
            data += weight.tobytes()
    offsets = [len(data), len(data) + size]
    header[EMBEDDINGS] = {"dtype": "F32", "shape": [rows, size // rows // 4], "data_offsets": offsets}
    words = json.dumps(header).encode()
    with (teacher / "model.safetensors").open("wb") as file:
        file.write(len(words).to_bytes(8, "little") + words + data)
        file.truncate(8 + len(words) + len(data) + size)
    start = pipeline.generate.passes.start_engine

    def limited(*arguments: Any) -> Any:
        run_out()
        return start(*arguments)

    monkeypatch.setattr(pipeline.generate.passes, "start_engine", limited)
    line = fail(teacher)
    assert line.startswith("distily-cache: out of memory while loading the teacher in float32 (")
    assert "--teacher-load-in-8bit" in line and "--dtype bfloat16" in line


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(2**50, dtype=torch.uint8),
        lambda: bytearray(2**62),
        lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")),
    ],
)
def test_what_libraries_raise(allocate: Callable[[], object]) -> None:
    with (
        pytest.raises(EngineError, match=r"^out of memory while trying \(.+\); buy more$"),
        memory_for("trying", "buy more"),
    ):
        allocate()


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), memory_for("trying", "buy more"):
        torch.ones(2, 3) @ torch.ones(2, 3)
