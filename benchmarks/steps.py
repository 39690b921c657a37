"""Training steps as functions of a batch, on labels and from a cache: what the studies of speed time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from featurestore.reader import CacheReader
from student.data.decoding import decode_targets
from student.losses.sparse import SparseTargets
from student.objective.terms import Objective, Term
from student.training.model import DistillationModel
from student.training.plan import load_teacher

Step = Callable[[dict[str, Any]], Tensor]
HEAD, DRAWS = 12, 16  # of the default distribution


def student(teacher: Path, layers: int, device: str = "cpu") -> Any:
    """So many layers of the teacher's shape in float32, random, the same numbers each time."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(teacher, num_hidden_layers=layers, dtype=torch.float32)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config).train()


def labels(model: Any) -> Step:
    """The loss of transformers' own model."""
    return lambda batch: model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss


def cached(cache: Path, *terms: Term) -> Callable[[Any], Step]:
    """The loss of our model on these terms."""

    def make(model: Any) -> Step:
        objective = Objective.of(terms)
        parts = load_teacher(objective, CacheReader.open(cache))
        distillation = DistillationModel(model, objective, parts).train()
        return lambda batch: distillation(**batch)["loss"]

    return make


def sparse_targets(label_N: Tensor, vocabulary: int) -> SparseTargets:
    """Distributions of HEAD tokens, the same for all positions, and DRAWS random others."""
    count, device = len(label_N), label_N.device

    def full(*shape: int, value: int = 0, dtype: torch.dtype = torch.int16) -> Tensor:
        return torch.full((count, *shape), value, dtype=dtype, device=device)

    draws = torch.randint(HEAD, vocabulary, (count, DRAWS), device=device).sort(-1).values.int()
    coded = {
        "counts": full(value=HEAD),
        "odds": full(),
        "ids": torch.arange(HEAD, dtype=torch.int32, device=device).expand(count, -1),
        "gaps": full(HEAD, value=1),
        "draws": draws,
        "repeats": torch.ones_like(draws),
        "entropy": full(),
    }
    return decode_targets(coded, label_N)
