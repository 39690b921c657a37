"""One token from each row's distribution, by numbers that were drawn before.

B rows, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def uniforms(seed: int, count: int) -> npt.NDArray[np.float64]:
    """float64 [count] in [0, 1): those that the text of this seed (0 <= seed < 2**63) is drawn by."""
    return np.random.Generator(np.random.Philox(key=seed)).random(count)


def draw(scores_BV: Tensor, uniform_B: Tensor, temperature: float, top_p: float) -> Tensor:
    """int64 [B]: tokens drawn from softmax(scores / temperature), cut to its nucleus.

    The nucleus is the smallest set of most probable tokens that has a mass of at least `top_p` (Holtzman et
    al. 2020, arXiv:1904.09751). Inverse CDF by rank at uniform_B (float64, in [0, 1)), so that a row's token
    does not depend on the rows beside it. Temperature 0 takes the most probable token.
    """
    if temperature == 0:
        return scores_BV.argmax(-1)
    sorted_BV, order_BV = scores_BV.double().sort(dim=-1, descending=True, stable=True)
    upto_BV = (sorted_BV / temperature).softmax(-1).cumsum(-1)
    kept_B1 = (upto_BV < top_p).sum(-1, keepdim=True).clamp_(max=upto_BV.shape[-1] - 1)
    point_B1 = uniform_B[:, None] * upto_BV.gather(-1, kept_B1)
    rank_B1 = torch.searchsorted(upto_BV, point_B1, right=True).minimum(kept_B1)
    return order_BV.gather(-1, rank_B1)[:, 0]
