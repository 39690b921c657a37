"""The two chains of elementwise operations of BitLinear's forward pass, as they are or each in one kernel.

Ten operations on small tensors cost a GPU ten launches, and ten trips of large ones to its memory. There
torch.compile makes a kernel of each chain, after a comparison with the plain functions: where a result
differs in one bit, or compiling fails, these are used and a warning says so. CPUs take them always.

Shape letters: N tokens, I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from distily.logs import LOG
from student.bitnet.quantizers import to_int8

# Division as IEEE rounds it, which Triton's own is not.
_EXACT: dict[str, str | int | bool | Callable[..., object]] = {"eager_numerics.division_rounding": True}


def rescale(
    sums_NO: Tensor, inverse_N1: Tensor, weight_scale: Tensor, bias_O: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Output [N, O] in `dtype` from sums of integer products, which may be overwritten."""
    # As transformers' packed layers do it: another rounding would move activations of later layers to the
    # next integer.
    inverse_N1 = inverse_N1 * weight_scale.reciprocal()
    exact = sums_NO.dtype in (torch.float32, torch.float64)
    y_NO = sums_NO.div_(inverse_N1) if exact else sums_NO / inverse_N1
    if bias_O is not None:
        y_NO += bias_O
    return y_NO.to(dtype)


class Chains(NamedTuple):
    """The functions `to_int8` and `rescale`, or what computes the same."""

    to_int8: Callable[[Tensor], tuple[Tensor, Tensor]]
    rescale: Callable[[Tensor, Tensor, Tensor, Tensor | None, torch.dtype], Tensor]


PLAIN = Chains(to_int8, rescale)


def chains(kind: str) -> Chains:
    """For a device type. Whoever compiles a whole model gets the plain ones to compile."""
    return PLAIN if kind != "cuda" or torch.compiler.is_compiling() else _compared(kind)


@cache
def _compared(kind: str) -> Chains:
    try:
        compiled = compile_chains()
        if agree(compiled, kind):
            return compiled
        reason = "it gives other bits here"
    except Exception as error:  # no compiler for Triton's launchers, an unknown option: of many kinds
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
    LOG.warning(f"BitLinear computes without torch.compile, in more launches and as exactly: {reason}")
    return PLAIN


def compile_chains() -> Chains:
    """By torch.compile, once for all sizes."""
    return Chains(
        torch.compile(to_int8, dynamic=True, options=_EXACT),
        torch.compile(rescale, dynamic=True, options=_EXACT),
    )


@torch.no_grad()
def agree(other: Chains, kind: str) -> bool:
    """Whether other chains give the results of the plain ones to the bit, of a sample of many magnitudes."""
    generator = torch.Generator(kind).manual_seed(0)
    magnitude_N1 = torch.linspace(-6, 6, 67, device=kind).exp().unsqueeze(1)
    sums_NO = torch.randint(-(2**20), 2**20, (67, 999), generator=generator, device=kind, dtype=torch.int32)
    for dtype in (torch.float32, torch.bfloat16):
        x_NI = (torch.randn(67, 999, generator=generator, device=kind) * magnitude_N1).to(dtype)
        inverse_N1, scale, bias_O = PLAIN.to_int8(x_NI)[1], x_NI[7, 7].abs().float(), x_NI[3]
        right, found = (
            (
                *chain.to_int8(x_NI),
                chain.rescale(sums_NO, inverse_N1, scale, None, dtype),
                chain.rescale(sums_NO, inverse_N1, scale, bias_O, dtype),
            )
            for chain in (PLAIN, other)
        )
        if not all(torch.equal(a, b) for a, b in zip(right, found, strict=True)):
            return False
    return True
