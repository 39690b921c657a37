"""The two products of BitLinear's backward pass, in full precision and of int8 values, and what chooses.

y[n, o] = scale[n] weight_scale sum_i ints[n, i] ternary[o, i], straight through, gives

    dX[n, i] =           weight_scale sum_o dY[n, o] ternary[o, i]
    dW[o, i] =           sum_n dY[n, o] scale[n] ints[n, i]

where ternary weights and int8 activations are exact and only dY is to be rounded. An integer product needs a
scale that does not depend on what is summed over. So dX takes dY with a scale per token, and dW takes
dY * scale with a scale per output. Gradients of easy and hard tokens differ in size, so each block of tokens
has scales of its own in dW, see `block_size`. Rounding is to nearest: stochastic rounding, though unbiased,
has twice the variance and was measured to be worse (benchmarks/results/int8_backward.md).

Shape letters: N tokens, I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from student.bitnet.chains import chains
from student.bitnet.int_mm import int_mm

EVERY = 25  # steps between two comparisons with full precision
LOWEST = 0.999  # cosine to full precision below which a product is not left to int8

Product = Callable[..., Tensor]


def block_size(kind: str) -> int:
    """Tokens that share scales in dW, for a device type: few where a product of few is as quick, while a GPU
    would launch ten kernels for each block, and read and write all of dW. The gates compare whichever it is
    with full precision.
    """
    return 4096 if kind == "cuda" else 256


def full_input_gradient(
    grad_NO: Tensor, ternary_OI: Tensor, weight_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """dX [N, I] in `dtype`."""
    product_NI = torch.mm(grad_NO, ternary_OI.to(grad_NO.dtype))
    return chains(grad_NO).scale_product(product_NI, weight_scale, dtype)


def full_weight_gradient(grad_NO: Tensor, ints_NI: Tensor, inverse_N1: Tensor) -> Tensor:
    """dW [O, I] in dY's dtype; inverse_N1: of the scales of the activations."""
    scaled_ON = chains(grad_NO).scale_rows(grad_NO, inverse_N1).t()
    return torch.mm(scaled_ON, ints_NI.to(grad_NO.dtype))


def int8_input_gradient(
    grad_NO: Tensor, ternary_OI: Tensor, weight_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """dX [N, I] in `dtype`, of dY in int8 with a scale per token."""
    own = chains(grad_NO)
    grad_ints_NO, grad_scale_N1 = own.gradient_rows(grad_NO)
    return own.rescale_gradient(int_mm(grad_ints_NO, ternary_OI), grad_scale_N1, weight_scale, dtype)


def int8_weight_gradient(grad_NO: Tensor, ints_NI: Tensor, inverse_N1: Tensor) -> Tensor:
    """dW float32 [O, I], of dY * scale in int8 with a scale per output and block of tokens."""
    size = block_size(grad_NO.device.type)
    total_OI = torch.zeros(grad_NO.shape[1], ints_NI.shape[1], device=grad_NO.device)
    for start in range(0, len(grad_NO), size):
        block = slice(start, start + size)
        grad_ints_NO, grad_scale_1O = chains(grad_NO).gradient_columns(grad_NO[block], inverse_N1[block])
        total_OI.addcmul_(int_mm(grad_ints_NO.t(), ints_NI[block]).float(), grad_scale_1O.t())
    return total_OI


@dataclass
class Gate:
    """Whether one product of one layer is left to int8: where its cosine to full precision was at least
    LOWEST when they were compared last.

    checking: compare in every pass, until told otherwise. cosine: the lowest of the last comparison, None
    where there was none yet; the next pass then compares whatever `checking` says.
    """

    checking: bool = True
    cosine: float | None = None

    def check(self, now: bool) -> None:
        """Begin a new comparison, or go by the last one."""
        self.checking = now
        if now:
            self.cosine = None

    @property
    def open(self) -> bool:
        """Whether the last comparison, if any, let int8 pass."""
        return self.cosine is None or self.cosine >= LOWEST

    def choose(self, int8: Product, full: Product, *operands: Any) -> Tensor:
        """One of two ways to a product. A pass that compares returns what it has found to be good enough."""
        if self.cosine is not None and not self.checking:
            return int8(*operands) if self.open else full(*operands)
        fast, right = int8(*operands), full(*operands)
        found = cosine(fast, right)
        self.cosine = found if self.cosine is None else min(found, self.cosine)
        return fast if found >= LOWEST else right


@dataclass
class Gates:
    """Of the two products of a layer."""

    inputs: Gate = field(default_factory=Gate)
    weights: Gate = field(default_factory=Gate)


def input_gradient(
    grad_NO: Tensor, ternary_OI: Tensor, weight_scale: Tensor, dtype: torch.dtype, gates: Gates | None
) -> Tensor:
    """dX [N, I] in `dtype`, of full products where there are no gates."""
    operands = (grad_NO, ternary_OI, weight_scale, dtype)
    if gates is None:
        return full_input_gradient(*operands)
    return gates.inputs.choose(int8_input_gradient, full_input_gradient, *operands)


def weight_gradient(grad_NO: Tensor, ints_NI: Tensor, inverse_N1: Tensor, gates: Gates | None) -> Tensor:
    """dW [O, I], in full precision where there are no gates."""
    operands = (grad_NO, ints_NI, inverse_N1)
    if gates is None:
        return full_weight_gradient(*operands)
    return gates.weights.choose(int8_weight_gradient, full_weight_gradient, *operands)


def cosine(a: Tensor, b: Tensor) -> float:
    """Of two tensors as vectors, in float64; 1 when both are zero, -1 when one is not finite."""
    a, b = a.double().flatten(), b.double().flatten()
    norms = a.norm() * b.norm()
    if norms == 0:
        return float(torch.equal(a, b))
    return float((a @ b / norms).nan_to_num(-1.0, -1.0, -1.0))
