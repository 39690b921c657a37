"""Hidden states to rows of four or two bits a number, on the device that they are on.

`featurestore.format.states.rotated` says what is in a row.

Shape letters: N states, D hidden size, S blocks of B numbers, P numbers of all blocks, K outliers, W bytes.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from featurestore.format.states.rotated import (
    BLOCK,
    PATTERNS,
    RotatedLayout,
    levels,
    rotate_,
    signs_of,
    unrotate_,
)


def encode_rotated(states_ND: torch.Tensor, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of bytes, uint8 [N, W], of float32 states; sums over D of (stored - given)^2, float32 [N]."""
    layout = RotatedLayout(dtype, states_ND.shape[1])
    # 1. The largest numbers are kept as they are; what their rounding leaves stays in the rest.
    places_NK = states_ND.abs().topk(layout.outliers, dim=-1).indices
    outliers_NK = states_ND.gather(-1, places_NK).bfloat16()
    rest_ND = states_ND.scatter_add(-1, places_NK, -outliers_NK.float())
    apart = [places_NK.to(torch.int32).to(torch.int16).view(torch.uint8), outliers_NK.view(torch.uint8)]
    # 2. Rotated, the blocks are as long as they were.
    rest_PN = pad(rest_ND, (0, layout.padded - layout.size)).t().contiguous()
    columns = torch.arange(layout.padded + PATTERNS, device=states_ND.device)
    signs = signs_of(columns, torch.cat(apart, dim=-1).long(), layout)
    rotate_(rest_PN, signs)
    # 3. Codes and scales. A block of zeros has a scale of zero, and any code will do.
    blocks_SBN = rest_PN.view(layout.blocks, BLOCK, -1)
    table = levels(torch.arange(2**layout.bits, dtype=torch.float32, device=rest_PN.device), layout.bits)
    code = _by_largest if layout.bits == 4 else _by_length
    codes_SBN, scale_SN = code(blocks_SBN, table)
    error_PN = (table[codes_SBN] * scale_SN.float().unsqueeze(1) - blocks_SBN).view_as(rest_PN)
    if layout.padded != layout.size:  # what falls on no column does not count
        unrotate_(error_PN, signs)
    # 4. Side by side as bytes.
    codes_PN = codes_SBN.view_as(rest_PN).to(torch.uint8)
    in_byte = 8 // layout.bits
    packed_CN = codes_PN[0::in_byte]
    for place in range(1, in_byte):
        packed_CN = packed_CN | codes_PN[place::in_byte] << place * layout.bits
    scales = scale_SN.t().clone(memory_format=torch.contiguous_format).view(torch.uint8)
    rows_NW = torch.cat([packed_CN.t(), scales, *apart], dim=-1)
    return rows_NW, error_PN[: layout.size].square().sum(0)


def _by_largest(blocks_SBN: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [S, B, N] and scales, bfloat16 [S, N]: the number of each block that is the largest without its
    sign, with its sign. Codes are the nearest levels.
    """
    scale_SN = blocks_SBN.gather(1, blocks_SBN.abs().argmax(1, keepdim=True))[:, 0].bfloat16()
    return _nearest(blocks_SBN, scale_SN.float(), table), scale_SN


def _by_length(blocks_SBN: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes are the nearest levels of a block of length 1 a number. The scale makes the product of the stored
    with the exact block the square of the exact one's length.
    """
    square_SN = _sum(blocks_SBN.square())
    codes_SBN = _nearest(blocks_SBN, (square_SN / BLOCK).sqrt(), table)
    along_SN = _sum(table[codes_SBN] * blocks_SBN)
    return codes_SBN, torch.where(along_SN > 0, square_SN / along_SN, 0.0).bfloat16()


def _nearest(blocks_SBN: torch.Tensor, scale_SN: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    ratio_SBN = blocks_SBN / scale_SN.masked_fill(scale_SN == 0, 1.0).unsqueeze(1)
    return torch.bucketize(ratio_SBN, (table[1:] + table[:-1]) / 2)


def _sum(blocks_SBN: torch.Tensor) -> torch.Tensor:
    """Over the B numbers of each block, in an order that does not depend on how many rows there are."""
    while blocks_SBN.shape[1] > 1:
        half = blocks_SBN.shape[1] // 2
        blocks_SBN = blocks_SBN[:, :half] + blocks_SBN[:, half:]
    return blocks_SBN[:, 0]
