"""Which positions of a sample belong to a share of them.

Each position has a number u in [0, 1) that depends on the sample's id, the position and a seed only, and a
share F is those with u < F. So a position is in it with probability F, whatever the batch, the engine or the
layer; a sum over the share divided by F is an unbiased estimate of the sum over all (Horvitz and Thompson
1952); and a larger share holds all of a smaller one: what it adds are the positions with G <= u < F.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from featurestore.format.tail import uniforms

_DOMAIN = b"distily-cache positions v1\0"


def kept_positions(
    sample_id: str, length: int, share: float, seed: int, above: float = 0.0
) -> npt.NDArray[np.int32]:
    """int32 [n], ascending: the positions of a sample of `length` that are in a share and not in the smaller
    one `above`.
    """
    u_T = position_draws(sample_id, length, seed)
    return np.flatnonzero((u_T >= above) & (u_T < share)).astype(np.int32)


def position_draws(sample_id: str, length: int, seed: int) -> npt.NDArray[np.float64]:
    """float64 [T]: u of each position of a sample of `length`, uniform in [0, 1)."""
    key = blake3(_DOMAIN + seed.to_bytes(8, "little") + bytes.fromhex(sample_id)).digest(8)
    return uniforms(key, 0, length)
