"""The chains of elementwise operations around BitLinear's products, as they are or each in one kernel.

Ten operations on small tensors cost a GPU ten launches, and ten trips of large ones to its memory. There
`chains_triton` makes a kernel of each chain (of two reductions, two), after a comparison with the plain
functions: where a result differs in one bit, or Triton fails, the plain ones are used and a warning says so.
CPUs take them always, and so does torch.compile, which makes kernels of its own of them.

Shape letters: N tokens, I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distily.logs import LOG
from student.bitnet.quantizers import LEVELS, quantize_weight, to_int8

TINY = 1e-30  # smallest maximum that a scale of gradients is made of: 127 / TINY is finite
PART = 2**16  # values of a part of a matrix, for each thread of a CPU: it stays in the cache of its core


def on_cpu(x: Tensor) -> bool:
    """Whether operations run one by one on a CPU."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def parts(x_NI: Tensor) -> Iterator[slice]:
    """Rows of a matrix that a chain of operations takes at once: as many as stay in a CPU's cache from one
    operation to the next, where a whole weight would travel to memory and back, into pages that the system
    clears anew each time. GPUs and torch.compile get all rows, in one launch or loop.
    """
    if not on_cpu(x_NI):
        yield slice(None)
        return
    rows = max(1, PART * torch.get_num_threads() // max(1, x_NI.shape[1]))
    yield from (slice(start, start + rows) for start in range(0, len(x_NI), rows))


def quantize_rows(x_NI: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """`to_int8`, and with a dtype the integers in it, too, for products of floating-point numbers."""
    ints_NI, inverse_N1 = to_int8(x_NI)
    return ints_NI, inverse_N1, None if dtype is None else ints_NI.to(dtype)


def rescale(
    sums_NO: Tensor, inverse_N1: Tensor, weight_scale: Tensor, bias_O: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Output [N, O] in `dtype` from sums of integer products, which may be overwritten."""
    # As transformers' packed layers do it: another rounding would move activations of later layers to the
    # next integer.
    inverse_N1 = inverse_N1 * weight_scale.reciprocal()
    if sums_NO.dtype == torch.int32 and on_cpu(sums_NO):
        sums_NO = sums_NO.float()  # the division would do so, too, and take twice as long
    exact = sums_NO.dtype in (torch.float32, torch.float64)
    y_NO = sums_NO.div_(inverse_N1) if exact else sums_NO / inverse_N1
    if bias_O is not None:
        y_NO += bias_O
    return y_NO.to(dtype)


def blend_rows(
    x_NI: Tensor, ints_NI: Tensor, inverse_N1: Tensor, strength: float, dtype: torch.dtype
) -> Tensor:
    """x + strength * (Q(x) - x) in `dtype`, with the gradient of x (straight through)."""
    blended_NI: Tensor = _Blend.apply(x_NI, ints_NI, inverse_N1.reciprocal(), strength, dtype)  # type: ignore[no-untyped-call]
    return blended_NI


def blend_weight(
    weight_OI: Tensor,
    ternary_OI: Tensor,
    scale: Tensor,
    bias_O: Tensor | None,
    strength: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """The same of a weight, and the bias that goes with it in `dtype`."""
    blended_OI: Tensor = _Blend.apply(weight_OI, ternary_OI, scale.expand(len(weight_OI), 1), strength, dtype)  # type: ignore[no-untyped-call]
    return blended_OI, None if bias_O is None else bias_O.to(dtype)


class _Blend(torch.autograd.Function):
    """Straight through: the gradient of the full-precision values [N, I]; `ints` times `scales` [N, 1] stand
    for them.
    """

    @staticmethod
    def forward(
        ctx: Any, full_NI: Tensor, ints_NI: Tensor, scale_N1: Tensor, strength: float, dtype: torch.dtype
    ) -> Tensor:
        ctx.dtype = full_NI.dtype
        blended_NI = torch.empty(full_NI.shape, dtype=dtype, device=full_NI.device)
        for rows in parts(full_NI):
            full = full_NI[rows]
            # Converted first: an operation that does so by itself takes twice as long on a CPU.
            step = ints_NI[rows].float().mul_(scale_N1[rows])
            step = step.to(torch.promote_types(full.dtype, torch.float32)).sub_(full).mul_(strength)
            torch.add(full, step.to(full.dtype), out=blended_NI[rows])
        return blended_NI

    @staticmethod
    def backward(ctx: Any, grad_NI: Tensor) -> tuple[Tensor | None, ...]:
        return grad_NI.to(ctx.dtype), None, None, None, None


def scale_product(product_NI: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """dX in `dtype` from the product of dY with ternary weights, which may be overwritten."""
    return product_NI.mul_(weight_scale).to(dtype)


def scale_rows(grad_NO: Tensor, inverse_N1: Tensor) -> Tensor:
    """dY times the scales of the activations, in dY's dtype."""
    return (grad_NO * inverse_N1.reciprocal()).to(grad_NO.dtype)


def quantize_gradient(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Int8 values and float32 scales, one per slice along `dim` of a matrix; x ~ int8 * scale, off by half a
    scale at most. A slice that is not finite gets a scale that is not.
    """
    x = x.float()
    buffer = x.abs()
    scale = buffer.amax(dim, keepdim=True).clamp_(min=TINY).mul_(1 / LEVELS)
    return torch.div(x, scale, out=buffer).round_().to(torch.int8), scale


def gradient_rows(grad_NO: Tensor) -> tuple[Tensor, Tensor]:
    """dY in int8 with a scale per token: (int8 [N, O], float32 [N, 1])."""
    return quantize_gradient(grad_NO, dim=1)


def gradient_columns(grad_NO: Tensor, inverse_N1: Tensor) -> tuple[Tensor, Tensor]:
    """dY times the scales of the activations, in int8 with a scale per output: (int8 [N, O], float32
    [1, O]).
    """
    return quantize_gradient(grad_NO * inverse_N1.reciprocal(), dim=0)


def rescale_gradient(
    sums_NI: Tensor, grad_scale_N1: Tensor, weight_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """dX in `dtype` from sums of products of `gradient_rows` with ternary weights."""
    return (sums_NI * (grad_scale_N1 * weight_scale)).to(dtype)


class Chains(NamedTuple):
    """Functions of this module's names and of `quantize_weight`, or what computes the same."""

    quantize_rows: Callable[[Tensor, torch.dtype | None], tuple[Tensor, Tensor, Tensor | None]]
    quantize_weight: Callable[[Tensor], tuple[Tensor, Tensor]]
    rescale: Callable[[Tensor, Tensor, Tensor, Tensor | None, torch.dtype], Tensor]
    blend_rows: Callable[[Tensor, Tensor, Tensor, float, torch.dtype], Tensor]
    blend_weight: Callable[
        [Tensor, Tensor, Tensor, Tensor | None, float, torch.dtype], tuple[Tensor, Tensor | None]
    ]
    scale_product: Callable[[Tensor, Tensor, torch.dtype], Tensor]
    scale_rows: Callable[[Tensor, Tensor], Tensor]
    gradient_rows: Callable[[Tensor], tuple[Tensor, Tensor]]
    gradient_columns: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    rescale_gradient: Callable[[Tensor, Tensor, Tensor, torch.dtype], Tensor]


PLAIN = Chains(
    quantize_rows,
    quantize_weight,
    rescale,
    blend_rows,
    blend_weight,
    scale_product,
    scale_rows,
    gradient_rows,
    gradient_columns,
    rescale_gradient,
)


def chains(x: Tensor) -> Chains:
    """For what is on the device of a tensor and of its type. Kernels know no float64, and whoever compiles a
    whole model gets the plain functions to compile.
    """
    if torch.compiler.is_compiling() or x.dtype == torch.float64 or x.device.type != "cuda":
        return PLAIN
    return compared(x.device)


@cache
def compared(device: torch.device) -> Chains:
    """Triton's kernels where they are there and right, else the plain functions."""
    try:
        from student.bitnet.chains_triton import KERNELS

        if agree(KERNELS, device):
            return KERNELS
        reason = "it gives other bits here"
    except Exception as error:  # not installed, no C compiler for its launchers, an old GPU: of many kinds
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
    LOG.warning(f"BitLinear computes without Triton's kernels, in more launches and as exactly: {reason}")
    return PLAIN


def agree(other: Chains, device: torch.device) -> bool:
    """Whether other chains give the results of the plain ones to the bit, of a sample of many magnitudes."""
    for dtype in (torch.float32, torch.bfloat16):
        right, found = (_sample(chain, device, dtype) for chain in (PLAIN, other))
        if not all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(right, found, strict=True)):
            return False
    return True


@torch.no_grad()
def _sample(chain: Chains, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """All results of one chain after another."""
    generator = torch.Generator().manual_seed(0)
    magnitude_N1 = torch.linspace(-6, 6, 17).exp().unsqueeze(1)
    x_NI = (torch.randn(17, 256, generator=generator) * magnitude_N1).to(device, dtype)
    # Sums of absolute values are exact in any order, and their number is a power of two: one mean.
    weight_OI = (torch.randint(-128, 129, (128, 256), generator=generator) / 256).to(device, dtype)
    sums_NO = torch.randint(-(2**20), 2**20, (17, 128), generator=generator, dtype=torch.int32).to(device)
    grad_NO, bias_O = x_NI[:, :128] * 1e-5, x_NI[3, :128]

    ints_NI, inverse_N1, factor_NI = chain.quantize_rows(x_NI, dtype)
    ternary_OI, scale = chain.quantize_weight(weight_OI)
    blended_OI, low_O = chain.blend_weight(weight_OI, ternary_OI, scale, bias_O, 0.3, torch.bfloat16)
    grad_ints_NO, grad_scale_N1 = chain.gradient_rows(grad_NO)
    assert factor_NI is not None and low_O is not None
    return [
        ints_NI,
        inverse_N1,
        factor_NI,
        ternary_OI,
        scale,
        chain.rescale(sums_NO, inverse_N1, scale, None, dtype),
        chain.rescale(sums_NO.float(), inverse_N1, scale, bias_O, dtype),
        chain.blend_rows(x_NI, ints_NI, inverse_N1, 0.3, torch.bfloat16),
        blended_OI,
        low_O,
        # A number that is one in bfloat16, too, to which torch rounds it on a GPU, and not on a CPU.
        chain.scale_product(x_NI.clone(), torch.tensor(0.375, device=device), torch.float32),
        chain.scale_rows(grad_NO, inverse_N1),
        grad_ints_NO,
        grad_scale_N1,
        *chain.gradient_columns(grad_NO, inverse_N1),
        chain.rescale_gradient(sums_NO, grad_scale_N1, scale, dtype),
    ]
