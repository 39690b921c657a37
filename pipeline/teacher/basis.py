"""The basis of the final state, calibrated on states of a shard and the teacher's head.

Shape letters: N states, D hidden size, V vocabulary, r coordinates.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor as Torch

from featurestore.format.sidecar import BasisSpec, HeadSpec, Part, Tensor
from featurestore.format.states.transform import MAX_BITS, code_bits

# Positions for each dimension with which a basis is about as good as with more (results/final_tier.md).
ENOUGH = 8
# Positions of which the mean Fisher information is taken, and how many at a time.
_FISHER_ROWS, _CHUNK, _TOKENS = 1024, 64, 2**14
# Directions that the distribution does not feel, or that no state has, still count this much.
_LEAST = 1e-6
_ROUNDS = 4


def calibrate(
    states_ND: np.ndarray, head: Part[HeadSpec], dtype: str
) -> tuple[BasisSpec, Mapping[str, Tensor]]:
    """The basis for final states as `dtype`, made of float32 states, all finite, and the LM head."""
    return calibrate_in(fisher(states_ND, head), states_ND, dtype)


def calibrate_in(
    metric_DD: Torch, states_ND: np.ndarray, dtype: str
) -> tuple[BasisSpec, Mapping[str, Tensor]]:
    """The basis in which e' metric e, with e the error of a state, is small; metric: float64 [D, D]."""
    states = torch.from_numpy(np.ascontiguousarray(states_ND)).double()
    rows, size = states.shape
    mean_D = states.mean(0)
    # 1. Errors count as A e, with A'A the metric.
    value, vector = torch.linalg.eigh(metric_DD)
    largest = value.max() if value.max() > 0 else 1.0
    root = value.clamp_min(largest * _LEAST).sqrt()
    weighted_ND = (states - mean_D) @ (vector * root)
    # 2. Few states do not show where others lie, and one, or the same again, shows nothing. So beside them
    # stands, as if it were one more, the guess that all directions are alike; where there are enough, not.
    length = states.square().mean()
    unseen = max(0.0, 1 / (rows + 1) - 1 / (ENOUGH * size + 1))
    prior_D = unseen * (length if length > 0 else 1.0) * root.square()
    seen_ND = weighted_ND * math.sqrt(1 - unseen)
    # 3. The Karhunen-Loeve transform there; variances are those of rows of one length, as they are stored.
    covariance = seen_ND.T @ seen_ND / rows + prior_D.diag()
    covariance += _LEAST * covariance.trace() / size * torch.eye(size, dtype=torch.float64)
    turn = torch.linalg.eigh(covariance)[1].flip(1)
    at_ND, prior_D = seen_ND @ turn, prior_D @ turn.square()
    variance_D = at_ND.square().mean(0) + prior_D + _LEAST * covariance.trace() / size
    bits = code_bits(dtype, size)
    for _ in range(_ROUNDS):
        widths_D = torch.tensor(water_filling(variance_D.tolist(), bits))
        used = widths_D > 0
        length_N1 = (at_ND[:, used].square() / variance_D[used]).mean(1, keepdim=True).sqrt()
        length_N1[length_N1 == 0] = 1.0
        variance_D = (at_ND / length_N1).square().mean(0) + prior_D + _LEAST * variance_D.mean()
    widths_D = torch.tensor(water_filling(variance_D.tolist(), bits))
    # 4. The widest first; the matrices there and back.
    order = widths_D.sort(descending=True, stable=True).indices[: int((widths_D > 0).sum())]
    deviation_r = variance_D[order].sqrt()
    encode_Dr = ((vector * root) @ turn)[:, order] / deviation_r
    decode_rD = deviation_r[:, None] * ((vector / root) @ turn)[:, order].T
    counts = [int((widths_D == width).sum()) for width in range(MAX_BITS, 0, -1)]
    spec = BasisSpec(dtype=dtype, hidden_size=size, counts=tuple(counts))
    tensors = {
        "mean": mean_D.float(),
        "encode": whole(encode_Dr).float(),
        "decode": decode_rD.float(),
        "levels": torch.cat([gaussian_levels(width) for width in range(1, MAX_BITS + 1)]).float(),
    }
    return spec, {name: Tensor("f32", one.contiguous().numpy()) for name, one in tensors.items()}


def fisher(states_ND: np.ndarray, head: Part[HeadSpec]) -> Torch:
    """float64 [D, D]: the mean over states of the covariance of the head's rows under the teacher's
    distribution, whose half is the KL divergence that an error makes, to second order. A softcap counts in
    the distribution and not in its derivative.
    """
    step = max(1, len(states_ND) // _FISHER_ROWS)
    chosen_ND = torch.from_numpy(states_ND[::step][:_FISHER_ROWS].copy())
    weight_VD = torch.from_numpy(head.tensors["weight"].to_float32())
    bias = head.tensors.get("bias")
    total_V = torch.zeros(len(weight_VD), dtype=torch.float64)
    found = torch.zeros(weight_VD.shape[1], weight_VD.shape[1], dtype=torch.float64)
    for part_ND in torch.split(chosen_ND, _CHUNK):
        logits_NV = part_ND @ weight_VD.T
        if bias is not None:
            logits_NV += torch.from_numpy(bias.to_float32())
        logits_NV *= head.spec.logit_scale
        if (cap := head.spec.logit_softcap) is not None:
            logits_NV = cap * torch.tanh(logits_NV / cap)
        p_NV = logits_NV.softmax(-1)
        mean_ND = (p_NV @ weight_VD).double()
        found -= mean_ND.T @ mean_ND
        total_V += p_NV.double().sum(0)
    for start in range(0, len(weight_VD), _TOKENS):
        rows_VD, part_V = weight_VD[start : start + _TOKENS], total_V[start : start + _TOKENS].float()
        found += (rows_VD.T @ (part_V[:, None] * rows_VD)).double()
    return found * (head.spec.logit_scale**2 / len(chosen_ND))


def water_filling(variances: list[float], bits: int) -> list[int]:
    """Whole bits for each coordinate, `bits` in all, each given where it lowers the error most."""
    lowered = [a - b for a, b in pairwise(_distortions())]
    widths, heap = [0] * len(variances), [(-v * lowered[0], i) for i, v in enumerate(variances)]
    heapq.heapify(heap)
    for _ in range(bits):
        _, i = heapq.heappop(heap)
        widths[i] += 1
        if widths[i] < MAX_BITS:
            heapq.heappush(heap, (-variances[i] * lowered[widths[i]], i))
    return widths


def whole(matrix_Dr: Torch) -> Torch:
    """Each column rounded to whole numbers of 15 bits and a sign, times a power of two."""
    _, exponent_r = torch.frexp(matrix_Dr.abs().amax(0))
    whole_Dr = torch.ldexp(matrix_Dr, 15 - exponent_r).round()
    found: Torch = torch.ldexp(whole_Dr, exponent_r - 15)
    return found


@cache
def gaussian_levels(bits: int) -> Torch:
    """float64 [2^bits]: the levels of Lloyd and Max for a Gaussian of variance 1, by Lloyd's iteration."""
    count = 2**bits
    places = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    # Their density is that of a Gaussian to the power of a third where they are many.
    levels = math.sqrt(3) * torch.special.ndtri(places)
    for _ in range(400):
        _, mass, moment = _cells(levels)
        levels = moment / mass
    found: Torch = levels
    return found


def _cells(levels: Torch) -> tuple[Torch, Torch, Torch]:
    """Bounds, mass and first moment of the cells of these levels."""
    inf = torch.tensor([math.inf], dtype=torch.float64)
    bounds = torch.cat([-inf, (levels[1:] + levels[:-1]) / 2, inf])
    density = torch.exp(-bounds.square() / 2) / math.sqrt(2 * math.pi)
    return bounds, torch.special.ndtr(bounds).diff(), -density.diff()


@cache
def _distortions() -> list[float]:
    """The mean square error of a Gaussian of variance 1 in 0 to 8 bits."""
    found: list[Any] = [1.0]
    for bits in range(1, MAX_BITS + 1):
        levels = gaussian_levels(bits)
        _, mass, moment = _cells(levels)
        found.append(float(1 - 2 * (levels * moment).sum() + (levels.square() * mass).sum()))
    return found
