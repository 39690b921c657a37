"""`balance: gradient_norm`: weights as ratios of gradient norms, not of losses.

A weight that suits one model may let one term drown the others on the next: the weight published for
attention relations (BitDistill, arXiv:2510.13998) gave a ratio of 221 between the gradients of attention and
cross-entropy on another model. Here the gradient of each term is measured by itself, and its weight divided
by the norm. Norms are compared on the parameters of the student's decoder layers, all together: all terms
share them. Embeddings and LM head, which terms between hidden states reach late or never, are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distily.safety.parsing import read_json
from distily.system.files import write_json
from student.errors import StudentError
from student.training.model import DistillationModel

EVERY = 25  # steps between measurements; each costs a forward and backward pass per term
KEEP = 0.5  # share of the older measurements, in logarithms
BALANCE_FILE = "balance.json"


class GradientBalance:
    """Gradient norms of an objective's terms, smoothed, and the weights that follow from them."""

    def __init__(self, terms: int) -> None:
        self._logs: list[float | None] = [None] * terms

    def update(self, norms: Sequence[float]) -> None:
        """Take in a measurement. A norm that is zero or not finite leaves a term as it was."""
        for index, norm in enumerate(norms):
            if math.isfinite(norm) and norm > 0:
                old = self._logs[index]
                new = math.log(norm)
                self._logs[index] = new if old is None else KEEP * old + (1 - KEEP) * new

    def weights(self, wanted: Sequence[float]) -> list[float]:
        """w_i n_1 / n_i: the weight of the first term is as asked for, those of the others make their
        gradients `w_i / w_1` times as long. As asked for where nothing was measured yet.
        """
        first = self._logs[0]
        return [
            weight if first is None or log is None else weight * math.exp(first - log)
            for weight, log in zip(wanted, self._logs, strict=True)
        ]

    def save(self, directory: Path) -> None:
        """For resuming."""
        write_json(directory / BALANCE_FILE, {"log_norms": self._logs})

    def load(self, directory: Path) -> None:
        """Reads what `save` wrote; StudentError unless it is of as many terms."""
        try:
            logs = read_json(directory / BALANCE_FILE)["log_norms"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StudentError(f"{directory}: {BALANCE_FILE} cannot be read: {error}") from error
        numbers = isinstance(logs, list) and all(
            log is None or (isinstance(log, float) and math.isfinite(log)) for log in logs
        )
        if not numbers or len(logs) != len(self._logs):
            raise StudentError(f"{directory}: {BALANCE_FILE} is of another objective; resume with its own")
        self._logs = logs


def gradient_norms(model: DistillationModel, batch: Mapping[str, Any]) -> Tensor:
    """Norm of the gradient of each unweighted term with respect to the parameters of the decoder layers,
    float32 [S]. Needs checkpointing, if any, that is not reentrant.
    """
    parameters = [p for p in model.student.get_decoder().layers.parameters() if p.requires_grad]
    objective, weights = model.objective, model.weights
    norms = []
    try:
        for term in objective.terms:
            model.objective, model.weights = replace(objective, terms=(term,)), [1.0]
            loss = model(**batch)["loss"]
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            squares = [g.float().square().sum() for g in gradients if g is not None]
            norms.append(torch.stack(squares).sum().sqrt() if squares else loss.new_zeros(()).float())
    finally:
        model.objective, model.weights = objective, weights
    return torch.stack(norms)
