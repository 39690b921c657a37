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


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Graphs that dynamo has made, after each step of what is trained."""
    seen: list[int] = []
    step = CacheTrainer.training_step

    def counted(self: CacheTrainer, *args: Any, **kwargs: Any) -> Any:
        loss = step(self, *args, **kwargs)
        seen.append(counters["stats"]["unique_graphs"])
        return loss

    monkeypatch.setattr(CacheTrainer, "training_step", counted)
    torch._dynamo.reset()
    counters.clear()
    return seen


@pytest.mark.parametrize(
    ("flags", "settled"),
    [
        ((), 1),
        (TERNARY, 1),
        (("--gradient-checkpointing", *TERNARY), 1),
        (("--bitnet-warmup-weights", "0.5", *TERNARY), 3),  # which ends there
    ],
    ids=["full", "ternary", "checkpointing", "warm-up"],
)
def test_it_compiles_no_more_after_two_lengths(
    train: Callable[..., dict[str, Any]],
    tmp_path: Path,
    graphs: list[int],
    flags: tuple[str, ...],
    settled: int,
) -> None:
    """The backend "eager" follows the code and computes as it does, so that every bit is comparable."""
    train(tmp_path / "plain", *STEPS, *flags)
    assert set(graphs) == {0}
    graphs.clear()
    train(tmp_path / "compiled", *STEPS, *flags, "--torch-compile-backend", "eager")
    assert graphs[0] > 0 and len(set(graphs[settled:])) == 1
    plain, compiled = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "compiled"))
    assert plain.keys() == compiled.keys()
    assert all(torch.equal(plain[name], compiled[name]) for name in plain)
