"""Hidden states to rows of four bits a number, on the device that they are on.

`featurestore.format.int4` says what is in a row.

Shape letters: N states, D hidden size, S blocks of B numbers, P numbers of all blocks, K outliers, W bytes.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from featurestore.format.int4 import BLOCK, Int4Layout, levels, rotate_, unrotate_


def encode_int4(states_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of bytes, uint8 [N, W], of float32 states; sums over D of (stored - given)^2, float32 [N]."""
    layout = Int4Layout(states_ND.shape[1])
    columns_P = torch.arange(layout.padded, device=states_ND.device)
    # 1. The largest numbers are kept as they are; what their rounding leaves stays in the rest.
    places_NK = states_ND.abs().topk(layout.outliers, dim=-1).indices
    outliers_NK = states_ND.gather(-1, places_NK).bfloat16()
    rest_ND = states_ND.scatter_add(-1, places_NK, -outliers_NK.float())
    # 2. Rotated, the blocks are as long as they were.
    rest_PN = pad(rest_ND, (0, layout.padded - layout.size)).t().contiguous()
    rotate_(rest_PN, columns_P)
    # 3. The number of each block that is the largest without its sign is the scale, with its sign.
    blocks_SBN = rest_PN.view(layout.blocks, BLOCK, -1)
    scale_SN = blocks_SBN.gather(1, blocks_SBN.abs().argmax(1, keepdim=True))[:, 0].bfloat16()
    scale_S1N = scale_SN.float().unsqueeze(1)
    # 4. The nearest level; a block of zeros has a scale of zero, and any code will do.
    table = levels(torch.arange(16, dtype=torch.float32, device=rest_PN.device))
    ratio_SBN = blocks_SBN / scale_S1N.masked_fill(scale_S1N == 0, 1.0)
    codes_SBN = torch.bucketize(ratio_SBN, (table[1:] + table[:-1]) / 2)
    error_PN = (table[codes_SBN] * scale_S1N - blocks_SBN).view_as(rest_PN)
    if layout.padded != layout.size:  # what falls on no column does not count
        unrotate_(error_PN, columns_P)
    # 5. Side by side as bytes.
    codes_PN = codes_SBN.view_as(rest_PN).to(torch.uint8)
    parts = [
        (codes_PN[0::2] | codes_PN[1::2] << 4).t(),
        scale_SN.t().clone(memory_format=torch.contiguous_format).view(torch.uint8),
        places_NK.to(torch.int32).to(torch.int16).view(torch.uint8),
        outliers_NK.view(torch.uint8),
    ]
    return torch.cat(parts, dim=-1), error_PN[: layout.size].square().sum(0)
