"""The integer reference forward: what every export of a BitNet student has to compute.

Ternary weights times int8 activations, summed exactly, divided by both scales in float32 afterwards. Weights
stay packed at two bits; a layer's matrix exists while the layer runs. Operation for operation this is
transformers' offline `BitLinear` in float32 and the training forward, so that they agree to the last bit: a
difference of one rounding would move some activation to the next integer, and a few layers turn that into the
noise of the quantisation itself.

Shape letters: N tokens, I input features, O output features, R rows of packed bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from student.bitnet import BitLinear, bit_linears, int_mm, quantize_weight, to_int8
from student.export.packing import pack, unpack


class IntegerLinear(nn.Module):
    """A linear layer with packed ternary weights, for inference.

    `weight` is uint8 [R, I]; `weight_scale` float32 [1] is the inverse of the matrix's scale, as
    transformers' `BitLinear` stores it; `bias` float [O] or None; `rms_norm` a norm of the input or None.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        packed_RI: Tensor,
        inverse_scale: Tensor,
        out_features: int,
        bias_O: Tensor | None = None,
        rms_norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = packed_RI.shape[1], out_features
        self.register_buffer("weight", packed_RI)
        self.register_buffer("weight_scale", inverse_scale.detach().float().reshape(1).clone())
        self.register_buffer("bias", None if bias_O is None else bias_O.detach())
        self.rms_norm = rms_norm

    def ternary(self) -> Tensor:
        """The matrix, int8 [O, I] in {-1, 0, 1}."""
        return unpack(self.weight, self.out_features)

    def product(self, ints_NI: Tensor) -> Tensor:
        """The exact sums of products, float32 [N, O]."""
        return int_mm(ints_NI, self.ternary().t()).float()

    def forward(self, input: Tensor) -> Tensor:
        """Input [..., I] of any float dtype; output [..., O] of the same."""
        x = input if self.rms_norm is None else self.rms_norm(input)
        ints_NI, inverse_N1 = to_int8(x.reshape(-1, self.in_features))
        sums_NO = self.product(ints_NI)
        y_NO = sums_NO / (inverse_N1 * self.weight_scale)
        if self.bias is not None:
            y_NO += self.bias
        return y_NO.to(input.dtype).reshape(*input.shape[:-1], self.out_features)


def input_norm(layer: nn.Module) -> nn.Module | None:
    """The norm that a BitLinear applies to its input before it quantises it, or None; as transformers'
    Llama norm, whose formula every reader has.
    """
    norm = getattr(layer, "rms_norm", None)
    if norm is None:
        return None
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    copy = LlamaRMSNorm(norm.weight.shape[0], eps=norm_epsilon(norm))
    copy.weight = nn.Parameter(norm.weight.detach().float(), requires_grad=False)
    own: nn.Module = copy
    return own


def norm_epsilon(norm: Any) -> float:
    """The epsilon of an RMS norm, under either of its usual names."""
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)


@torch.no_grad()
def to_integers(model: nn.Module) -> None:
    """Replace every BitLinear of `model` by its IntegerLinear; the latent weights are gone afterwards."""
    for name, layer in list(bit_linears(model)):
        model.set_submodule(name, _integer_linear(layer))


def _integer_linear(layer: BitLinear) -> IntegerLinear:
    ternary_OI, scale = quantize_weight(layer.weight)
    return IntegerLinear(pack(ternary_OI), 1.0 / scale, layer.out_features, layer.bias, input_norm(layer))


def integer_linears(model: nn.Module) -> Iterator[tuple[str, IntegerLinear]]:
    """All IntegerLinear layers of a model with their names."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, IntegerLinear))
