"""The scales of ternary matrices as float16 holds them, without a change of what the student computes.

GGUF's blocks have float16 scales. Rounded one by one, to 2^-11 each, they would move some activations to the
next integer in every layer. But a layer's scales are not all needed for themselves: of queries and keys, of
values and the attention's output, of the MLP's up and down projections only the products count, and the norm
before the gate can take what rounding leaves of its scale. Two float16 numbers near two given ones hit their
product to 2^-20 or so, 2^-17 at worst.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from student.export.reference import IntegerLinear

_NEIGHBOURS = np.arange(-512, 513)  # of a float16 number: up to half off; more give no new products
_SMALLEST, _LARGEST = 1, 0x7BFF  # bits of the positive finite float16 numbers


@torch.no_grad()
def fit_scales(model: Any) -> None:
    """Give every IntegerLinear of a decoder of Llama's shape a scale that is a float16 number."""
    for block in model.get_decoder().layers:
        attention, mlp = block.self_attn, block.mlp
        rest = _fold(mlp.gate_proj, block.post_attention_layernorm.weight)
        mlp.up_proj.weight_scale.mul_(rest)
        queries, keys = float16_pair(_scale(attention.q_proj), _scale(attention.k_proj))
        _rescale(attention.q_proj, queries)
        _rescale(attention.k_proj, keys)
        for first, second in ((attention.v_proj, attention.o_proj), (mlp.up_proj, mlp.down_proj)):
            if second.rms_norm is None:
                one, other = float16_pair(_scale(first), _scale(second))
                _rescale(first, one)
                second.weight_scale.fill_(1.0 / other)
            else:  # which takes the first one's scale away, but for its epsilon
                _rescale(first, float(np.float16(_scale(first))))
                _fold(second, second.rms_norm.weight)


def _scale(layer: IntegerLinear) -> float:
    return 1.0 / float(layer.weight_scale)


def _rescale(layer: IntegerLinear, scale: float) -> None:
    """Change a layer's scale and with it all of its output."""
    if layer.bias is not None:
        layer.bias.mul_(scale / _scale(layer))
    layer.weight_scale.fill_(1.0 / scale)


def _fold(layer: IntegerLinear, norm_I: Tensor) -> float:
    """Round a layer's scale and multiply the weights of the norm before it with the rest, which is
    returned; its output stays what it was.
    """
    half = float(np.float16(_scale(layer)))
    rest = _scale(layer) / half
    norm_I.mul_(rest)
    layer.weight_scale.fill_(1.0 / half)
    return rest


def float16_pair(first: float, second: float) -> tuple[float, float]:
    """Two float16 numbers near the given ones, with the same product as nearly as that can be."""
    bits = np.float16(first).view(np.uint16).astype(int) + _NEIGHBOURS
    ones = bits.clip(_SMALLEST, _LARGEST).astype(np.uint16).view(np.float16).astype(np.float64)
    others = (first * second / ones).astype(np.float16).astype(np.float64)
    best = int(np.abs(ones * others - first * second).argmin())
    return float(ones[best]), float(others[best])
