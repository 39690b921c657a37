"""What vLLM cannot capture: one line that names --engine transformers, exit code 2, nothing stored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from featurestore.format.schema import LogitsSpec
from pipeline.engines.base import EngineConfig
from pipeline.engines.vllm_engine import VllmEngine
from pipeline.errors import RequestError
from tests import architectures
from tests.command import spawn
from tests.teachers import text_of


def engine(teacher: Path, architecture: str) -> None:
    """Asks for an engine for a teacher of that architecture, as its config would."""
    VllmEngine(
        EngineConfig(
            model=teacher,
            architecture=architecture,
            groups=(LogitsSpec(4),),
            dtype="float32",
            max_seq_len=64,
            vocab_size=199,
            hidden_size=64,
            num_layers=3,
        )
    )


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("NoSuchForCausalLM", "does not know NoSuchForCausalLM"),
        ("BertModel", "not a language model in vLLM"),
    ],
)
def test_architectures_are_refused_before_the_engine_starts(
    tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, reason: str
) -> None:
    monkeypatch.setattr("pipeline.engines.llm._start", lambda *_, **__: pytest.fail("vLLM was started"))
    with pytest.raises(RequestError, match=f"--engine vllm: .*{reason}.*--engine transformers"):
        engine(tiny_teacher, architecture)


@pytest.mark.vllm
def test_a_line_from_the_worker_is_the_commands_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 3n passes four streams at a time from layer to layer."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # starts faster
    teacher = architectures.make("gemma3n_text", tmp_path / "teacher")
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(json.dumps({"text": text_of(30)}))
    store = tmp_path / "store"
    done = spawn("distily-cache", "generate", teacher, corpus, "--out", store, "--hidden-layers", 1, code=2)
    assert "Traceback" not in done.stderr and "Triton" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert "--hidden-layers" in last and "--engine transformers" in last and "[4, 30, 64]" in last
    assert not list(store.glob("commit/*/*.json"))
