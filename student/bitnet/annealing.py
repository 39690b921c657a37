"""Softened ternary weights that harden while a student is trained (Hestia, arXiv:2601.20745).

Rounding has no slope, so latent weights in the dead zone learn by the straight-through estimator alone.
Here a weight stands for the mean of the three levels under a softmax of its squared distances to them, at a
temperature that falls to zero; the gradient is that of this very function. With z = w / scale,

    y(z) = sum over l in {-1, 0, 1} of l p_l,   p_l proportional to exp(-(z - l)^2 / temperature)

Each matrix has a temperature of its own, see `calibration.relative_temperatures`.

Shape letters: I input features, O output features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# At which y(z) of normally distributed weights is nearest to z: their mean absolute value is the scale.
FIRST = 0.4
LOWEST = 0.01  # below it weights are rounded


@dataclass(frozen=True)
class Annealing:
    """Temperatures as a function of the step: FIRST while the strength of the weights
    rises, then falling as a cosine, to rounding at the share `end` of all steps; 0 softens nothing.

    start: share of the steps in which the strength rises, see `warmup.Warmup`.
    """

    start: float = 0.0
    end: float = 0.0

    def at(self, step: int, max_steps: int) -> float:
        """Temperature in the step that follows `step` finished ones, before a
        matrix's own factor."""
        done = step / max(max_steps, 1)
        if done >= self.end:
            return 0.0
        fallen = max(0.0, (done - self.start) / (self.end - self.start))
        return FIRST * 0.5 * (1 + math.cos(math.pi * fallen))


class _Soften(torch.autograd.Function):
    """Keeps the slope, float32 [O, I], for the backward pass."""

    @staticmethod
    def forward(ctx: Any, weight_OI: Tensor, scale: Tensor, temperature: float, strength: float) -> Tensor:
        z_OI = weight_OI.float() / scale
        level_OI, slope_OI = softened(z_OI, temperature)
        ctx.save_for_backward(slope_OI.mul_(strength).add_(1 - strength))
        ctx.dtype = weight_OI.dtype
        return torch.lerp(weight_OI.float(), level_OI.mul_(scale), strength)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_OI: Tensor) -> tuple[Tensor | None, ...]:
        (slope_OI,) = ctx.saved_tensors
        return (grad_OI * slope_OI).to(ctx.dtype), None, None, None


def softened(z: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(y, dy / dz) of weights in units of their scale, as above."""
    size = z.abs()
    # Of the three exponents, -1 is never the largest for |z|; what is subtracted keeps all of them below 1.
    near, far = (2 * size - 1) / temperature, (-2 * size - 1) / temperature
    top = near.clamp_min(0)
    plus, minus, zero = (near - top).exp_(), (far - top).exp_(), top.neg().exp_()
    total = plus + minus + zero
    y = (plus - minus) / total
    slope = ((plus + minus) / total - y.square()).mul_(2 / temperature)
    return y.copysign_(z), slope


def soften_weight(weight_OI: Tensor, scale: Tensor, temperature: float, strength: float) -> Tensor:
    """w + strength * (scale * y(w / scale) - w), float32 [O, I], with its own gradient; the scale, a scalar,
    counts as a constant.
    """
    softened_OI: Tensor = _Soften.apply(  # type: ignore[no-untyped-call]
        weight_OI, scale, temperature, strength
    )
    return softened_OI
