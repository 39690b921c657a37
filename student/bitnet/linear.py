"""BitNet b1.58 linear layers (Ma et al. 2024, arXiv:2402.17764) for training with full-precision latent
weights.

Weights become {-1, 0, 1} times one scale per tensor (mean absolute value), activations become int8 with one
scale per token (absolute maximum); gradients pass straight through both. While training, each quantiser and
the norm before them can be blended in: x + strength * (Q(x) - x).

Shape letters: N tokens, I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from student.bitnet.annealing import LOWEST, soften_weight
from student.bitnet.backward import Gates, input_gradient, weight_gradient
from student.bitnet.chains import chains
from student.bitnet.int_mm import int_mm, is_integer
from student.bitnet.shared_input import SharedInputs


class Strengths(NamedTuple):
    """How far a layer is on its way from full precision (0) to BitNet (1)."""

    weights: float = 1.0
    activations: float = 1.0
    norms: float = 1.0


FULL = Strengths()
_inputs = SharedInputs()


class RMSNorm(nn.Module):
    """x / sqrt(mean x^2 + eps) * weight over the last dimension, in float32 (arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] of any float dtype -> float32 [..., I]."""
        return nn.functional.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps)


class _Kept(NamedTuple):
    """A quantised weight with what it was made of. The alias holds the memory of the weight, so that no other
    can come to lie at its address.
    """

    alias: Tensor
    version: int
    ternary: Tensor
    scale: Tensor

    def is_of(self, weight: Tensor) -> bool:
        same_place = self.alias.data_ptr() == weight.data_ptr() and self.alias.device == weight.device
        return same_place and self.version == weight._version


class BitLinear(nn.Linear):
    """A linear layer that multiplies int8 activations with ternary weights; `weight` is the latent master.

    rms_norm: applied to the input before it is quantised, where there is one. strengths: of training; in eval
    mode the layer is always fully quantised. temperature: at which weights are softened while training, see
    `annealing`; 0 rounds them. relative_temperature: the matrix's own factor of it. gates: what lets
    gradients be of int8 products where the layer is fully quantised; without them they are in full precision.
    regathered: whether the weight is dropped between the forward and the backward pass, see
    `quantize_in_passes`.
    """

    rms_norm: RMSNorm | None
    gates: Gates | None
    _kept: _Kept | None

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.rms_norm = None
        self.gates = None
        self.strengths = FULL
        self.temperature, self.relative_temperature = 0.0, 1.0
        self.keeping = False  # see `quantize_once`
        self.regathered = False
        self._kept = None

    def forward(self, input: Tensor) -> Tensor:
        """Input [..., I] of any float dtype; output [..., O] in autocast's dtype when it is on, else in the
        input's.
        """
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        weights, activations, norms = self.strengths if self.training else FULL
        x = input
        if self.rms_norm is not None:  # at strength 0, too: DDP wants a gradient for every parameter
            x = self.rms_norm(x) if norms == 1 else torch.lerp(x.float(), self.rms_norm(x), norms)
        soft = self.training and self.temperature > 0
        if weights == activations == 1 and not soft:
            return self._quantised(x, dtype)
        weight_OI: Tensor = self.weight
        bias_O: Tensor | None = self.bias
        if soft:
            weight_OI = soften_weight(weight_OI, self.quantized()[1], self.temperature, weights)
        elif weights > 0:
            blend = chains(weight_OI).blend_weight
            weight_OI, bias_O = blend(weight_OI, *self.quantized(), bias_O, weights, dtype)
        if activations > 0:
            acts, x_NI = _inputs.quantised(x, self), x.reshape(-1, x.shape[-1])
            blended_NI = chains(x).blend_rows(x_NI, acts.ints_NI, acts.inverse_N1, activations, dtype)
            x = blended_NI.view(x.shape)
        bias_O = None if bias_O is None else bias_O.to(dtype)
        return nn.functional.linear(x.to(dtype), weight_OI.to(dtype), bias_O)

    def _quantised(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The layer behind the norm, fully quantised."""
        ternary_OI, scale = self.quantized()
        # Where the device does not multiply integers, floating-point numbers stand for them: up to 128 they
        # are exact in bfloat16, so only the accumulated sum is ever rounded.
        outputs, inputs = ternary_OI.shape
        whole = is_integer(x.device.type, x.numel() // inputs, inputs, outputs)
        acts = _inputs.quantised(x, self, None if whole else dtype)
        factor_NI = acts.ints_NI if whole else acts.factor(dtype)
        activations = (acts.ints_NI, factor_NI, acts.inverse_N1)
        weights = (self.weight, ternary_OI, scale)
        output: Tensor = _BitLinearFunction.apply(  # type: ignore[no-untyped-call]
            x, *activations, *weights, self.bias, dtype, self.gates, self.regathered
        )
        return output

    @torch.no_grad()
    def quantized(self) -> tuple[Tensor, Tensor]:
        """The weight's ternary form and scale, see `quantize_weight`; kept where `quantize_once` said so."""
        if not self.keeping or torch.compiler.is_compiling() or self.weight.is_inference():
            return chains(self.weight).quantize_weight(self.weight)
        if self._kept is None or not self._kept.is_of(self.weight):
            alias = self.weight.detach()
            self._kept = _Kept(alias, self.weight._version, *chains(alias).quantize_weight(alias))
        return self._kept.ternary, self._kept.scale

    def forget(self) -> None:
        """Quantise the weight anew when it is needed next."""
        self._kept = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles quantise for themselves."""
        return self.__dict__ | {"_kept": None}


class _BitLinearFunction(torch.autograd.Function):
    """Exact integer product forward, scales after it; int8 operands are all that is kept for the backward
    pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        ints_NI: Tensor,
        factor_NI: Tensor,
        inverse_N1: Tensor,
        weight_OI: Tensor,
        ternary_OI: Tensor,
        weight_scale: Tensor,
        bias_O: Tensor | None,
        dtype: torch.dtype,
        gates: Gates | None,
        regathered: bool,
    ) -> Tensor:
        if factor_NI.dtype == torch.int8:
            sums_NO = int_mm(factor_NI, ternary_OI.t())
        else:
            sums_NO = torch.mm(factor_NI, ternary_OI.to(factor_NI.dtype).t())
        y_NO = chains(sums_NO).rescale(sums_NO, inverse_N1, weight_scale, bias_O, dtype)
        # A weight that is gathered anew for the backward pass takes no memory until then, as its ternary form
        # would.
        kept_OI = weight_OI if regathered else ternary_OI
        ctx.save_for_backward(ints_NI, kept_OI, inverse_N1, weight_scale)
        ctx.x_like, ctx.weight_dtype = (x.shape, x.dtype), weight_OI.dtype
        ctx.bias_dtype = None if bias_O is None else bias_O.dtype
        ctx.gates, ctx.regathered = gates, regathered
        return y_NO.reshape(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ints_NI, kept_OI, inverse_N1, weight_scale = ctx.saved_tensors
        grad_NO = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            shape, dtype = ctx.x_like
            ternary_OI = chains(kept_OI).quantize_weight(kept_OI)[0] if ctx.regathered else kept_OI
            grad_x = input_gradient(grad_NO, ternary_OI, weight_scale, dtype, ctx.gates).reshape(shape)
        if ctx.needs_input_grad[4]:
            grad_weight = weight_gradient(grad_NO, ints_NI, inverse_N1, ctx.gates).to(ctx.weight_dtype)
        if ctx.needs_input_grad[7]:
            grad_bias = grad_NO.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return grad_x, None, None, None, grad_weight, None, None, grad_bias, None, None, None


def bit_linears(model: nn.Module) -> Iterator[tuple[str, BitLinear]]:
    """All BitLinear layers of a model with their names."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, BitLinear))


def set_strengths(model: nn.Module, strengths: Strengths) -> None:
    """Of all BitLinear layers, for training."""
    for _, layer in bit_linears(model):
        layer.strengths = strengths


def set_temperature(model: nn.Module, temperature: float) -> None:
    """Of all BitLinear layers, for training, each times its own factor."""
    for _, layer in bit_linears(model):
        own = temperature * layer.relative_temperature
        layer.temperature = own if own >= LOWEST else 0.0


def quantize_once(model: nn.Module) -> None:
    """From here on every weight is quantised once and then kept, until the next call.

    To be called after every change of the weights. Changes that autograd counts are noticed without it, but
    optimizers need not make such: torch's fused AdamW, bitsandbytes, and whatever writes through `.data`
    leave no trace on the tensor. Hence nothing is kept until somebody promises to call this.
    """
    for _, layer in bit_linears(model):
        layer.keeping = True
        layer.forget()


def quantize_in_passes(model: nn.Module) -> None:
    """For weights that are gathered for each pass and dropped after it (FSDP2): the backward pass quantises
    them once more, and nothing as large as a whole weight is kept.
    """
    for _, layer in bit_linears(model):
        layer.regathered = True


def quantize_always(model: nn.Module) -> None:
    """Takes that back: weights are quantised whenever they are multiplied."""
    for _, layer in bit_linears(model):
        layer.keeping = layer.regathered = False
        layer.forget()
