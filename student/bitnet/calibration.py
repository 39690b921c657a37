"""What conversion does to the function of a student before it is trained: weights of new norms that keep it
nearly as it was, and how far it moved.

The norm divides a token's activations by their root mean square, so its weights have to give the usual size
back. Over the tokens of some samples, weight c minimises the squared difference between activation and normed
activation of channel c: sum(x n) / sum(n^2), n = x / sqrt(mean x^2 + eps). That is a mean over tokens of the
root mean squares, in which tokens count by how much channel c stands out in them.

Shape letters: T positions, D hidden size, I input features of a projection.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from student.bitnet.convert import convert_student, norm_epsilon, normed
from student.bitnet.linear import FULL, Strengths, bit_linears, set_strengths


@dataclass(frozen=True)
class Drift:
    """Relative differences ||after - before|| / ||before|| of final hidden states over all tokens.

    norms: of the added norms alone, None where there are none. quantised: of norms and quantisation.
    """

    norms: float | None
    quantised: float


class _Products:
    """Sums over tokens, float32 [I]: of x n, and of n^2."""

    def __init__(self, eps: float) -> None:
        self._eps = eps
        self.cross: Tensor | float = 0.0
        self.square: Tensor | float = 0.0

    def add(self, x: Tensor) -> None:
        x_TI = x.detach().float().flatten(0, -2)
        n_TI = x_TI * torch.rsqrt(x_TI.square().mean(-1, keepdim=True) + self._eps)
        self.cross = self.cross + (x_TI * n_TI).sum(0)
        self.square = self.square + n_TI.square().sum(0)

    def weight(self) -> Tensor:
        """Channels that were never active get the scale of the others."""
        cross, square = torch.as_tensor(self.cross), torch.as_tensor(self.square)
        common = cross.sum() / square.sum().clamp(min=torch.finfo(square.dtype).tiny)
        return torch.where(square > 0, cross / square.clamp(min=torch.finfo(square.dtype).tiny), common)


@torch.no_grad()
def convert_calibrated(student: Any, conversion: str, samples: Sequence[Tensor]) -> Drift:
    """Convert the decoder layers of a full-precision student, with norms calibrated on `samples`.

    samples: token ids, int64 [T] each. The student stays in the mode it is in.
    """
    layers, eps = student.get_decoder().layers, norm_epsilon(student.config)
    names, training = normed(layers, conversion), student.training
    student.eval()
    products = {name: _Products(eps) for name in names}
    handles = [
        layers.get_submodule(name).register_forward_pre_hook(_adder(sums)) for name, sums in products.items()
    ]
    before = _final_states(student, samples)
    for handle in handles:
        handle.remove()
    convert_student(student, conversion)
    for name, sums in products.items():
        layers.get_submodule(name).rms_norm.weight.copy_(sums.weight())
    drift = Drift(
        norms=_distance(before, _final_states(student, samples, Strengths(0, 0, 1))) if names else None,
        quantised=_distance(before, _final_states(student, samples)),
    )
    student.train(training)
    return drift


def _adder(sums: _Products) -> Any:
    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        sums.add(args[0])

    return hook


def _final_states(student: Any, samples: Collection[Tensor], strengths: Strengths = FULL) -> list[Tensor]:
    """Behind the final norm, float32 [T, D] per sample; BitLinear layers with these strengths."""
    set_strengths(student, strengths)
    for _, layer in bit_linears(student):
        layer.train()  # in eval mode they are always fully quantised
    states = [
        student.get_decoder()(input_ids=tokens_T[None].to(student.device), use_cache=False)
        .last_hidden_state[0]
        .float()
        for tokens_T in samples
    ]
    set_strengths(student, FULL)
    return states


def _distance(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    difference = sum(float((one - other).square().sum()) for one, other in zip(before, after, strict=True))
    return math.sqrt(difference / sum(float(one.square().sum()) for one in before))
