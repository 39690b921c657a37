"""A Llama student as llama.cpp computes it on a CPU, as far as that moves activations to other integers.

Activations are quantised in blocks with a scale each: 256 columns beside TQ2_0 and TQ1_0 (ggml's Q8_K), 32
with float16 scales beside Q2_0 and Q4_0 (Q8_0). Integers are summed exactly within a block. Mean squares are
summed in float64, and a rotary angle is that of the channel before it times a constant.

Shape letters: B samples, T positions, N tokens, I input features, O output features, G blocks, C columns of a
block, H half a head's width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from student.export.reference import IntegerLinear, integer_linears


class BlockedLinear(IntegerLinear):
    """An IntegerLinear with activations in blocks; `columns` 256 or 32."""

    columns: int

    def forward(self, input: Tensor) -> Tensor:
        x = input if self.rms_norm is None else self.rms_norm(input)
        x_NGC = x.reshape(-1, self.in_features // self.columns, self.columns)
        peak_NG1 = x_NGC.gather(-1, x_NGC.abs().argmax(-1, keepdim=True))
        if self.columns == 256:
            inverse = -127 / peak_NG1
            scale = 1 / inverse
        else:
            inverse = 127 / peak_NG1.abs()
            scale = (peak_NG1.abs() / 127).half().float()
        ints_NGC = (x_NGC * torch.where(peak_NG1 == 0, 0, inverse)).round().clamp(max=127)
        ternary_OGC = self.ternary().float().view(self.out_features, -1, self.columns)
        sums_NGO = torch.einsum("ngc,ogc->ngo", ints_NGC, ternary_OGC)
        scale_NG1 = torch.where(peak_NG1 == 0, 0, scale) / self.weight_scale
        y_NO = (sums_NGO.double() * scale_NG1).sum(1).float()
        if self.bias is not None:
            y_NO += self.bias
        return y_NO.reshape(*input.shape[:-1], self.out_features)


class RepeatedAngles(nn.Module):
    """Rotary angles by repeated float32 products."""

    def __init__(self, base: float, half: int) -> None:
        super().__init__()
        self.half, self.factor = half, torch.tensor(base).pow(-1.0 / half)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = [position_ids.float()]
        for _ in range(self.half - 1):
            angles.append(angles[-1] * self.factor)
        angle_BTH = torch.stack(angles, -1).repeat(1, 1, 2).double()
        return angle_BTH.cos().float(), angle_BTH.sin().float()


class DoubleNorm(LlamaRMSNorm):  # type: ignore[misc]
    """An RMS norm whose mean is of float64 sums."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        mean = hidden_states.double().square().mean(-1, keepdim=True).float()
        normed: Tensor = hidden_states * (1.0 / torch.sqrt(mean + self.variance_epsilon)) * self.weight
        return normed


def emulate(model: Any, columns: int) -> None:
    """Let an integer Llama of float32 compute in that way, with blocks of so many columns."""
    for _, layer in integer_linears(model):
        layer.__class__ = BlockedLinear
        layer.columns = columns
    for norm in model.modules():
        if type(norm) is LlamaRMSNorm:
            norm.__class__ = DoubleNorm
    decoder = model.get_decoder()
    base = model.config.rope_parameters["rope_theta"]
    decoder.rotary_emb = RepeatedAngles(base, len(decoder.rotary_emb.inv_freq))
