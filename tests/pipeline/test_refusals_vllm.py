"""What vLLM cannot capture: one line that names --engine transformers, before an engine is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from featurestore.format.schema import LogitsSpec
from pipeline.engines.base import EngineConfig
from pipeline.engines.vllm_engine import VllmEngine
from pipeline.errors import RequestError


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
