"""The plans of large students in docs/recipes.md are what the command prints."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from transformers import Qwen2Config

from featurestore.format.schema import Sample
from tests.command import call
from tests.student.caches import write_unreal_cache
from tests.teachers import word_tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"
BLOCKS = re.findall(
    r"```text\n\$ (distily-train plan .*?)\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `cache`, of a teacher with the shape of Qwen2.5-14B and samples of 2,048 tokens."""
    place = tmp_path_factory.mktemp("large")
    config = Qwen2Config(
        vocab_size=152_064,
        hidden_size=5120,
        intermediate_size=13_824,
        num_hidden_layers=48,
        num_attention_heads=40,
        num_key_value_heads=8,
        tie_word_embeddings=False,
        architectures=["Qwen2ForCausalLM"],
    )
    config.save_pretrained(place / "teacher")
    word_tokenizer(199).save_pretrained(place / "teacher")
    rng = np.random.default_rng(0)
    samples = [
        Sample(tokens=rng.integers(152_064, size=2048).astype(np.int32), loss_mask=np.ones(2048, bool))
        for _ in range(64)
    ]
    write_unreal_cache(place / "cache", place / "teacher", samples)
    return place


@pytest.mark.parametrize(("line", "shown"), BLOCKS, ids=[str(number) for number in range(len(BLOCKS))])
def test_a_plan_is_what_the_command_prints(
    place: Path, monkeypatch: pytest.MonkeyPatch, line: str, shown: str
) -> None:
    """Every line that the page shows, in its order."""
    monkeypatch.chdir(place)
    program, *words = shlex.split(line)
    printed = iter(call(program, *words).stdout.splitlines())
    for expected in shown.splitlines():
        assert any(found.rstrip() == expected for found in printed), expected


def test_plans_are_shown() -> None:
    assert len(BLOCKS) == 2
