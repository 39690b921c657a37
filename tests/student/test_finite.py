"""A training that ends in NaNs says so, and saves none of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.architectures import make
from tests.command import generate
from tests.student.test_training import TWO_LAYERS, weights
from tests.teachers import text_of

Run = Callable[..., tuple[int, str, str]]
# The first step changes nothing, the second makes weights of 1e11, whose attention overflows in the third.
BURST = ("--learning-rate", "1e12", "--warmup_steps", 10, "--max_steps", 12, "--eval_strategy", "no")
NEVER = ("--save_strategy", "no")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ("--logging_steps", 6, *NEVER),
            "steps 2 to 6: the loss is not finite (kl, ce); lower --learning-rate",
        ),
        (("--logging_steps", 12, "--save_steps", 1), "step 3: the weights are not finite (student."),
        (("--logging_steps", 12, "--max_steps", 3, *NEVER), "step 3: the weights are not finite (student."),
    ],
)
def test_one_line_says_when_what_and_the_mends(
    distily_train: Run, cache: Path, tmp_path: Path, flags: tuple[object, ...], said: str
) -> None:
    base = (cache, "--output-dir", tmp_path, *TWO_LAYERS, "--ce-weight", 1, "--report-to", "none")
    code, _, err = distily_train(*base, *BURST, *flags)
    assert code == 1
    line = err.splitlines()[-1]
    assert line.startswith(f"distily-train: {said}") and "--max-grad-norm" in line
    assert not (tmp_path / "model.safetensors").exists() and not (tmp_path / "summary.json").exists()
    if "--save_steps" in flags:
        assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}
        last = weights(tmp_path / "checkpoint-2")
        assert all(torch.isfinite(tensor).all() for tensor in last.values())


def test_a_token_whose_embedding_is_zero_under_many_norms(distily_train: Run, tmp_path: Path) -> None:
    """Each norm multiplies the gradient of a row of zeros by 1 / sqrt(eps), 1000, and a Gemma 2 has four of
    its own in each layer, so that with those of every projection the gradient overflows.
    """
    teacher = make("gemma2", tmp_path / "teacher")
    tensors = load_file(teacher / "model.safetensors")
    tensors["model.embed_tokens.weight"][0] = 0  # of unknown words
    save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})
    texts = [json.dumps({"text": f"unheard {text_of(20, seed)}"}) for seed in range(8)]
    (tmp_path / "data.jsonl").write_text("\n".join(texts))
    generate(teacher, tmp_path / "data.jsonl", tmp_path / "cache", "--top-k", 8)
    flags = ("--student-model-as-bitnet", "--bitnet-conversion", "per-projection", "--logits-loss", "none")
    flags += ("--ce-weight", "1", "--max_steps", "4", "--eval-fraction", "0.25", "--report-to", "none")
    code, _, err = distily_train(tmp_path / "cache", "--output-dir", tmp_path / "out", *flags)
    assert code == 1
    assert err.splitlines()[-1].startswith("distily-train: step 1: the weights are not finite (student.")
