"""`--torch-compile`: one compilation serves all decoder layers and lengths, and trains the same student."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from student.training.trainer import CacheTrainer

STEPS = ("--max-steps", "6", "--eval-steps", "6", "--hidden-loss", "mse")
TERNARY = ("--student-model-as-bitnet", "--bitnet-conversion", "subln")


Step = tuple[int, tuple[int, ...]]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """After each step of what is trained: the graphs that dynamo has made, and the size of the batch."""
    seen: list[Step] = []
    step = CacheTrainer.training_step

    def counted(self: CacheTrainer, model: Any, inputs: dict[str, Any], *args: Any) -> Any:
        size = tuple(inputs["input_ids"].shape)
        loss = step(self, model, inputs, *args)
        seen.append((counters["stats"]["unique_graphs"], size))
        return loss

    monkeypatch.setattr(CacheTrainer, "training_step", counted)
    torch._dynamo.reset()
    counters.clear()
    return seen


@pytest.mark.parametrize(
    ("flags", "warm"),
    [
        ((), 0),
        (TERNARY, 0),
        (("--gradient-checkpointing", *TERNARY), 0),
        (("--bitnet-warmup-weights", "0.5", *TERNARY), 3),
    ],
    ids=["full", "ternary", "checkpointing", "warm-up"],
)
def test_it_compiles_no_more_after_two_lengths(
    train: Callable[..., dict[str, Any]],
    tmp_path: Path,
    steps: list[Step],
    flags: tuple[str, ...],
    warm: int,
) -> None:
    """The backend "eager" follows the code and computes as it does, so that every bit is comparable.

    warm: the number of steps of the warm-up, behind which there is other code to compile.
    """
    train(tmp_path / "plain", *STEPS, *flags)
    assert {made for made, _ in steps} == {0}
    steps.clear()
    train(tmp_path / "compiled", *STEPS, *flags, "--torch-compile-backend", "eager")
    graphs, sizes = zip(*steps, strict=True)
    second = next((number for number, size in enumerate(sizes) if size != sizes[0]), 0)
    assert graphs[0] > 0 and len(set(graphs[max(second, warm) :])) == 1
    plain, compiled = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "compiled"))
    assert plain.keys() == compiled.keys()
    assert all(torch.equal(plain[name], compiled[name]) for name in plain)
