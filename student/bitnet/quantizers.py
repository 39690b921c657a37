"""The two quantisers of BitNet b1.58 (Ma et al. 2024, arXiv:2402.17764), in float32 whatever they are given.

The formulas are those of transformers' online `AutoBitLinear`, so that a saved student computes the same
function there.

Shape letters: N tokens, I input features, O output features.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-5  # smallest mean or maximum that a scale is made of
LEVELS = 127  # largest int8 activation


def quantize_weight(weight_OI: Tensor, mean: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Ternary weights and their scale: (int8 [O, I] in {-1, 0, 1}, float32 scalar); weight ~ ternary
    * scale.

    mean: of the absolute values, where `weight_OI` has not all rows of the weight.
    """
    weight_OI = weight_OI.float()
    mean = weight_OI.abs().mean() if mean is None else mean
    inverse = 1.0 / mean.clamp(min=EPSILON)
    return (weight_OI * inverse).round_().clamp_(-1, 1).to(torch.int8), 1.0 / inverse


def quantize_activation(x_NI: Tensor) -> tuple[Tensor, Tensor]:
    """Int8 activations and their scale per token: (int8 [..., I], float32 [..., 1]); x ~ int8 * scale."""
    ints_NI, inverse_N1 = to_int8(x_NI)
    return ints_NI, 1.0 / inverse_N1


def to_int8(x_NI: Tensor) -> tuple[Tensor, Tensor]:
    """Int8 activations and the inverse of their scale per token: (int8 [..., I], float32 [..., 1])."""
    x_NI = x_NI.detach().float()
    buffer_NI = x_NI.abs()
    inverse_N1 = buffer_NI.amax(dim=-1, keepdim=True).clamp_(min=EPSILON).reciprocal_().mul_(LEVELS)
    # Nothing is to be clamped: three roundings from LEVELS a product cannot get to the next half.
    ints_NI = torch.mul(x_NI, inverse_N1, out=buffer_NI).round_()
    return ints_NI.to(torch.int8), inverse_N1
