"""Ternary matrices at two bits a weight, in the row layout of transformers' `BitLinear`.

Byte row r holds rows r, r + R, r + 2R and r + 3R of the matrix, lowest bits first, each as value + 1.

Shape letters: O output features, I input features, R = ceil(O / 4) rows of bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

PER_BYTE = 4


def pack(ternary_OI: Tensor) -> Tensor:
    """Int8 [O, I] in {-1, 0, 1} to uint8 [R, I]; rows that are missing to a multiple of 4 become zeros."""
    rows = -(-ternary_OI.shape[0] // PER_BYTE)
    padded = ternary_OI.new_zeros(rows * PER_BYTE, ternary_OI.shape[1])
    padded[: ternary_OI.shape[0]] = ternary_OI
    parts_4RI = (padded + 1).to(torch.uint8).view(PER_BYTE, rows, -1)
    packed_RI = parts_4RI[0].clone()
    for part in range(1, PER_BYTE):
        packed_RI |= parts_4RI[part] << (2 * part)
    return packed_RI


def unpack(packed_RI: Tensor, out_features: int) -> Tensor:
    """The int8 [O, I] that `pack` was given."""
    parts = torch.empty((PER_BYTE, *packed_RI.shape), dtype=torch.int8, device=packed_RI.device)
    for part in range(PER_BYTE):
        parts[part] = (packed_RI >> (2 * part)) & 3
    return parts.sub_(1).view(-1, packed_RI.shape[1])[:out_features]
