"""A Llama student as llama.cpp computes it on a CPU without vector instructions, rounding by rounding.

Activations are quantised in blocks with a scale each: 256 columns beside TQ2_0 and TQ1_0 (ggml's Q8_K), 32
with float16 scales beside Q2_0 and Q4_0 (Q8_0). Integers are summed exactly within a block and the blocks in
float32, one after the other. Mean squares and products of queries, keys and values are rounded to float32 and
summed in float64, a rotary angle is that of the channel before it times a constant, and the exponential is
ggml's polynomial. Builds with vector instructions sum in other orders and fuse products with sums.

Shape letters: B samples, T positions, S positions that are attended to, N tokens, I input features, O output
features, G blocks, C columns of a block, H half a head's width, A heads, D a head's width.
"""

from __future__ import annotations

import ctypes
import ctypes.util
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from student.export.reference import IntegerLinear, integer_linears

ATTENTION = "llama_cpp"  # in transformers' register


class BlockedLinear(IntegerLinear):
    """An IntegerLinear with activations in the blocks that belong to a type of GGUF, `kind`."""

    kind: str

    def forward(self, input: Tensor) -> Tensor:
        x = input if self.rms_norm is None else self.rms_norm(input)
        columns = 32 if self.kind in ("Q2_0", "Q4_0") else 256
        x_GNC = x.reshape(-1, self.in_features // columns, columns).transpose(0, 1)
        quantise = blocks_of_32 if columns == 32 else blocks_of_256
        ints_GNC, scale_GN1 = quantise(x_GNC)
        ternary_OGC = self.ternary().float().view(self.out_features, -1, columns)
        sums_GNO = ints_GNC @ ternary_OGC.permute(1, 2, 0)  # exact: integers below 2^24
        y_NO = self.sum_blocks(sums_GNO, scale_GN1)
        if self.bias is not None:
            y_NO += self.bias
        return y_NO.reshape(*input.shape[:-1], self.out_features)

    def sum_blocks(self, sums_GNO: Tensor, scale_GN1: Tensor) -> Tensor:
        """The blocks' sums times both scales, [N, O]; a block of Q2_0 has 64 columns, two of those."""
        weights = (1 / self.weight_scale).half().float()
        if self.kind == "Q2_0":
            scaled_GNO = scale_GN1 * sums_GNO
            terms_GNO = weights * (scaled_GNO[::2] + scaled_GNO[1::2])
        elif self.kind == "Q4_0":
            terms_GNO = sums_GNO * weights * scale_GN1
        else:
            terms_GNO = sums_GNO * (scale_GN1 * weights)
        y_NO = torch.zeros_like(terms_GNO[0])
        for term_NO in terms_GNO:
            y_NO += term_NO
        return y_NO


def blocks_of_32(x_GNC: Tensor) -> tuple[Tensor, Tensor]:
    """Integers and scales as Q8_0 has them: halves are rounded away from zero."""
    scale_GN1 = x_GNC.abs().amax(-1, keepdim=True) / 127
    inverse_GN1 = torch.where(scale_GN1 == 0, 0, 1 / scale_GN1)
    scaled_GNC = x_GNC * inverse_GN1
    ints_GNC = (scaled_GNC.abs().double() + 0.5).floor().float().copysign(scaled_GNC)
    return ints_GNC, scale_GN1.half().float()


def blocks_of_256(x_GNC: Tensor) -> tuple[Tensor, Tensor]:
    """Integers and scales as Q8_K has them: the value farthest from zero becomes -127."""
    peak_GN1 = x_GNC.gather(-1, x_GNC.abs().argmax(-1, keepdim=True))
    lowest = torch.tensor(-127.0)  # a number would be multiplied with the reciprocal instead
    inverse_GN1 = torch.where(peak_GN1 == 0, 0, lowest / peak_GN1)
    ints_GNC = (x_GNC * inverse_GN1).round().clamp(max=127)
    return ints_GNC, torch.where(peak_GN1 == 0, 0, 1 / inverse_GN1)


class RepeatedAngles(nn.Module):
    """Rotary angles by repeated float32 products; powers, sines and cosines are the C library's."""

    def __init__(self, base: float, half: int) -> None:
        super().__init__()
        self.half, self.factor = half, torch.tensor(c_function("powf", 2)(base, -1.0 / half))

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = [position_ids.float()]
        for _ in range(self.half - 1):
            angles.append(angles[-1] * self.factor)
        angle_BTH = torch.stack(angles, -1)
        cosine_BTH, sine_BTH = (
            torch.tensor([*map(c_function(name, 1), angle_BTH.flatten().tolist())]).view(angle_BTH.shape)
            for name in ("cosf", "sinf")
        )
        return cosine_BTH.repeat(1, 1, 2), sine_BTH.repeat(1, 1, 2)


def c_function(name: str, arguments: int) -> Any:
    """A function of the C library from float32 to float32."""
    function = getattr(ctypes.CDLL(ctypes.util.find_library("m")), name)
    function.argtypes, function.restype = [ctypes.c_float] * arguments, ctypes.c_float
    return function


class DoubleNorm(LlamaRMSNorm):  # type: ignore[misc]
    """An RMS norm whose mean is of float64 sums of float32 squares."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        mean = hidden_states.square().double().mean(-1, keepdim=True).float()
        normed: Tensor = hidden_states * (1.0 / torch.sqrt(mean + self.variance_epsilon)) * self.weight
        return normed


def exponential(x: Tensor) -> Tensor:
    """e^x: 2^n times a polynomial of what is left. Coefficients and order of operations are those of
    `ggml_v_expf` in ggml's vec.h, without fused products (after Arm's optimized routines).
    """
    hex_float = float.fromhex
    shift = hex_float("0x1.8p23")
    z = x * hex_float("0x1.715476p+0") + shift  # the lowest bits of z hold n
    n = z - shift
    b = x - n * hex_float("0x1.62e4p-1") - n * hex_float("0x1.7f7d1cp-20")
    exponent = z.view(torch.int32) << 23
    u = b * b
    high = (b * hex_float("0x1.0e4020p-7") + hex_float("0x1.573e2ep-5")) * u
    low = b * hex_float("0x1.555e66p-3") + hex_float("0x1.fffdb6p-2")
    j = (high + low) * u + b * hex_float("0x1.ffffecp-1")
    power = (exponent + torch.tensor(1.0).view(torch.int32)).view(torch.float32)
    # Beyond 2^±126 the power itself would overflow; it is applied in two steps there.
    part = torch.where(n <= 0, -0x7E000000, 0).int()  # 0x82000000
    first = (part + 0x7F000000).view(torch.float32)
    second = (exponent - part).view(torch.float32)
    wide = torch.where(n.abs() > 192, first * first, (second * j + second) * first)
    return torch.where(n.abs() > 126, wide, j * power + power)


class Silu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / (1 + exponential(-x))


def attend(
    module: nn.Module, q_BATD: Tensor, k_BASD: Tensor, v_BASD: Tensor, mask: None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Causal attention from the first position on, for transformers' register."""
    heads, length = q_BATD.shape[1:3]
    share = heads // k_BASD.shape[1]
    hidden_TS = torch.full((length, length), -torch.inf).triu(1)
    out_BATD = torch.empty_like(q_BATD)
    for sample, own_ATD in enumerate(q_BATD):
        for head, q_TD in enumerate(own_ATD):
            k_SD, v_SD = k_BASD[sample, head // share], v_BASD[sample, head // share]
            scores_TS = (q_TD[:, None] * k_SD).sum(-1, dtype=torch.float64).float() * scaling + hidden_TS
            powers_TS = exponential(scores_TS - scores_TS.amax(-1, keepdim=True))
            inverse_T1 = (1.0 / sum_of_fours(powers_TS)).float()
            weights_TS = powers_TS * inverse_T1
            products_TDS = weights_TS[:, None] * v_SD.t()
            out_BATD[sample, head] = products_TDS.sum(-1, dtype=torch.float64).float()
    return out_BATD.transpose(1, 2), None


def sum_of_fours(x_TS: Tensor) -> Tensor:
    """Four neighbours are summed in float32, in pairs, and their sums in float64, [T, 1]."""
    fours = nn.functional.pad(x_TS, (0, -x_TS.shape[-1] % 4)).unflatten(-1, (-1, 2, 2))
    pairs = fours[..., 0] + fours[..., 1]
    return (pairs[..., 0] + pairs[..., 1]).double().sum(-1, keepdim=True)


def emulate(model: Any, kind: str) -> None:
    """Let an integer Llama of float32 compute in that way, as with a file of this type."""
    for _, layer in integer_linears(model):
        layer.__class__ = BlockedLinear
        layer.kind = kind
    for norm in model.modules():
        if type(norm) is LlamaRMSNorm:
            norm.__class__ = DoubleNorm
    decoder = model.get_decoder()
    for block in decoder.layers:
        block.mlp.act_fn = Silu()
    base = model.config.rope_parameters["rope_theta"]
    decoder.rotary_emb = RepeatedAngles(base, len(decoder.rotary_emb.inv_freq))
    AttentionInterface.register(ATTENTION, attend)
    AttentionMaskInterface.register(ATTENTION, lambda *_, **__: None)
    model.config._attn_implementation = ATTENTION
