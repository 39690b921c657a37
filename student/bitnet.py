"""BitNet b1.58 linear layers (Ma et al. 2024, arXiv:2402.17764) for training with full-precision latent
weights.

Weights become {-1, 0, 1} times one scale per tensor (mean absolute value), activations become int8 with one
scale per token (absolute maximum); both quantisers work in float32 and pass gradients straight through. The
formulas are those of transformers' online `AutoBitLinear`, so a saved student computes the same function when
`from_pretrained` loads it there.

Shape letters: N tokens, I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

EPSILON = 1e-5  # smallest mean or maximum that a scale is made of
LEVELS = 127  # largest int8 activation


def quantize_weight(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Ternary weights and their scale: (int8 [O, I] in {-1, 0, 1}, float32 scalar); weight ~ ternary
    * scale.
    """
    weight_OI = weight_OI.float()
    inverse = 1.0 / weight_OI.abs().mean().clamp_(min=EPSILON)
    return (weight_OI * inverse).round_().clamp_(-1, 1).to(torch.int8), 1.0 / inverse


def quantize_activation(x_NI: Tensor) -> tuple[Tensor, Tensor]:
    """Int8 activations and their scale per token: (int8 [..., I], float32 [..., 1]); x ~ int8 * scale."""
    x_NI = x_NI.float()
    inverse_N1 = LEVELS / x_NI.abs().amax(dim=-1, keepdim=True).clamp_(min=EPSILON)
    return (x_NI * inverse_N1).round_().clamp_(-LEVELS - 1, LEVELS).to(torch.int8), 1.0 / inverse_N1


class BitLinear(nn.Linear):
    """A linear layer that multiplies int8 activations with ternary weights; `weight` is the latent master."""

    def forward(self, input: Tensor) -> Tensor:
        """Input [..., I] of any float dtype; output [..., O] in autocast's dtype when it is on, else in the
        input's.
        """
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        output: Tensor = _BitLinearFunction.apply(input, self.weight, self.bias, dtype)  # type: ignore[no-untyped-call]
        return output


class _BitLinearFunction(torch.autograd.Function):
    """Exact integer product forward, scales after it; int8 operands are all that is kept for the backward
    pass.

    Integers up to 128 are exact in bfloat16, so only the accumulated sum is ever rounded.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, dtype: torch.dtype) -> Tensor:
        ternary_OI, weight_scale = quantize_weight(weight_OI.detach())
        ints_NI, scale_N1 = quantize_activation(x.detach().reshape(-1, x.shape[-1]))
        sums_NO = torch.mm(ints_NI.to(dtype), ternary_OI.to(dtype).t())
        y_NO = sums_NO * (scale_N1 * weight_scale)
        if bias_O is not None:
            y_NO += bias_O.detach()
        ctx.save_for_backward(ints_NI, ternary_OI, scale_N1, weight_scale)
        ctx.x_like, ctx.weight_dtype = (x.shape, x.dtype), weight_OI.dtype
        ctx.bias_dtype = None if bias_O is None else bias_O.dtype
        return y_NO.to(dtype).reshape(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        ints_NI, ternary_OI, scale_N1, weight_scale = ctx.saved_tensors
        grad_NO = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            shape, dtype = ctx.x_like
            grad_x = (torch.mm(grad_NO, ternary_OI.to(grad.dtype)) * weight_scale).to(dtype).reshape(shape)
        if ctx.needs_input_grad[1]:
            scaled_ON = (grad_NO * scale_N1).to(grad.dtype).t()
            grad_weight = torch.mm(scaled_ON, ints_NI.to(grad.dtype)).to(ctx.weight_dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_NO.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None


def convert(layers: nn.Module) -> int:
    """Turn every nn.Linear under `layers` into a BitLinear that owns the same parameters; returns
    how many.
    """
    names = [name for name, module in layers.named_modules() if type(module) is nn.Linear]
    for name in names:
        linear = layers.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        with torch.device("meta"):
            bit = BitLinear(linear.in_features, linear.out_features, bias=linear.bias is not None)
        bit.weight, bit.bias = linear.weight, linear.bias
        layers.set_submodule(name, bit)
    return len(names)


def bit_linears(model: nn.Module) -> Iterator[tuple[str, BitLinear]]:
    """All BitLinear layers of a model with their names."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, BitLinear))


def quantization_config(model: nn.Module) -> dict[str, Any]:
    """The entry of config.json with which transformers loads the latent weights into its online
    AutoBitLinear.
    """
    kept = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    return {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "online",
        "modules_to_not_convert": kept,
    }


class FlipMeter:
    """How the ternary weights move: the share that changed since the last look, and the share of zeros."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._last = self._ternary()

    @torch.no_grad()
    def _ternary(self) -> dict[str, Tensor]:
        return {name: quantize_weight(layer.weight)[0] for name, layer in bit_linears(self._model)}

    def measure(self) -> dict[str, float]:
        """{"bitnet_flip_rate", "bitnet_zero_share"}, both in [0, 1]; the next call compares with this one."""
        now = self._ternary()
        size = sum(ternary.numel() for ternary in now.values())
        flips = sum(int((now[name] != self._last[name]).sum()) for name in now)
        zeros = sum(int((ternary == 0).sum()) for ternary in now.values())
        self._last = now
        return {"bitnet_flip_rate": flips / size, "bitnet_zero_share": zeros / size}
