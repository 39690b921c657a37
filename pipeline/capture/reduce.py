"""Reduce teacher outputs to features: the numerics that both engines share.

Shapes: N rows (positions of a chunk), V vocabulary, B blocks of C = BLOCK columns, the last one maybe
partial, K head size, M tail draws, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from featurestore.format.codec import HIDDEN_DTYPES
from featurestore.format.states.rotated import ROTATED
from featurestore.format.tail import van_der_corput
from pipeline.capture.rotated import encode_rotated

INT8_MAX = 127.0
FP8_MAX = 448.0  # largest finite float8_e4m3fn
# Columns of the vocabulary that are looked at together, before the search for a top or a draw looks inside.
BLOCK = 64
# Squaring doubles a weight's relative error; three times make 8 roundings of one.
MAX_SQUARED = 8
NO_DRAW = -1
# A token that the teacher masks out (-inf) adds nothing to the entropy; 0 times infinity would be NaN.
FARTHEST = -1e4


@dataclass(frozen=True, kw_only=True)
class LogitRows:
    """Reduced logits of N rows; all tensors on the device of the logits.

    counts int32 [N]: head size of each row, 1..K; head_ids int32 [N, K] and head_logits float32 [N, K],
    descending, meaningful up to `counts`; lse, label_logprob, entropy float32 [N] (nats); tail_draws int32
    [N, M]: token ids outside the head, ascending, repeats included (NO_DRAW where the tail has no mass), or
    None.
    """

    counts: torch.Tensor
    head_ids: torch.Tensor
    head_logits: torch.Tensor
    lse: torch.Tensor
    label_logprob: torch.Tensor
    entropy: torch.Tensor
    tail_draws: torch.Tensor | None


def reduce_logits(
    logits_NV: torch.Tensor,
    labels_N: torch.Tensor,
    top_k: int,
    top_p: float | None,
    tail: int = 0,
    shifts_N: torch.Tensor | None = None,
) -> LogitRows:
    """Top-k head, logsumexp, label log-probability, entropy and tail draws of each row.

    Args:
        logits_NV: raw logits, any float dtype; computed in float32.
        labels_N: int64 id of the token that follows each row; negative where there is none.
        top_k: K, 1..V: the head size, or its cap when `top_p` is given.
        top_p: stop the head at the first rank where its cumulative mass reaches p (nucleus, Holtzman 2020).
        tail: M, how often to draw from what is outside the head.
        shifts_N: float64 in [0, 1), where each row's draws begin (featurestore.format.tail.row_shifts); with
            `tail`.
    """
    # The head comes first: its best logit is the shift of every exponential below.
    logits = logits_NV.float()
    head_logits, head_ids = top(logits, top_k)
    peak = head_logits[:, :1]
    # One exponential pass serves both the normaliser and the entropy H = log(norm) - E[distance to the top].
    distance = logits - peak
    weights = distance.exp()
    norm = weights.sum(-1)
    expected = torch.linalg.vecdot(weights, distance.clamp_min_(FARTHEST)) / norm
    log_norm = norm.log()
    lse = peak[:, 0] + log_norm
    # bf16 teachers tie often and sums round: a one-token distribution may come out at -1e-7.
    entropy = (log_norm - expected).clamp_min(0.0)
    # From the full row, so that a label outside the head is known as well.
    picked = logits.gather(-1, labels_N.clamp_min(0)[:, None])[:, 0]
    label_logprob = label_logprobs(picked, lse, labels_N)
    counts = head_counts(head_logits, lse, top_p)
    draws = None
    if tail:
        # Draws are from the row without its head; of the head's columns those beyond top_p are tail, too.
        assert shifts_N is not None
        inside = torch.arange(top_k, device=counts.device) < counts[:, None]
        outside = torch.exp(head_logits - peak).masked_fill_(inside, 0.0)
        draws = sample_tail(weights.scatter_(-1, head_ids, outside), shifts_N.to(logits.device), tail)
    return LogitRows(
        counts=counts,
        head_ids=head_ids.int(),
        head_logits=head_logits,
        lse=lse,
        label_logprob=label_logprob,
        entropy=entropy,
        tail_draws=draws,
    )


def label_logprobs(picked_N: torch.Tensor, lse_N: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    """float32 [N]: log-probability of each label, whose logit is `picked_N`; NaN where there is no label."""
    return torch.where(labels_N >= 0, picked_N - lse_N, torch.full_like(lse_N, torch.nan))


def top(
    logits_NV: torch.Tensor, k: int, maxima_NB: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest logits of each row (float32), descending, and their columns (int64): a quick torch.topk.

    The k largest lie in the k blocks of columns whose own largest are the largest, so that only these and
    what is left beside whole blocks are sorted. `maxima_NB` are the largest logits of the blocks, where they
    are known already.
    """
    rows, vocab = logits_NV.shape
    blocks = vocab // BLOCK
    if 2 * k > blocks:
        ranked = torch.topk(logits_NV.float(), k, dim=-1)
        return ranked.values, ranked.indices
    whole = torch.unflatten(logits_NV[:, : blocks * BLOCK], -1, (blocks, BLOCK))
    largest = whole.amax(-1) if maxima_NB is None else maxima_NB[:, :blocks]
    best = largest.topk(k, dim=-1, sorted=False).indices
    row = torch.arange(rows, device=best.device).unsqueeze(-1)
    candidates = torch.cat([whole[row, best].flatten(1), logits_NV[:, blocks * BLOCK :]], dim=-1)
    ranked = torch.topk(candidates.float(), k, dim=-1)
    block, inside = ranked.indices // BLOCK, ranked.indices % BLOCK
    # What is left beside whole blocks comes after the k best ones, as one more block in its own place.
    best = torch.nn.functional.pad(best, (0, 1), value=blocks)
    return ranked.values, best.gather(-1, block) * BLOCK + inside


def lse_at(logits_NV: torch.Tensor, temperatures: Sequence[float]) -> list[torch.Tensor]:
    """float32 [N] for each of `temperatures`: logsumexp(logits / T) of each row, computed in float32.

    What is divided and exponentiated is the distance to the row's top, which float32 holds exactly where it
    counts, so that a low temperature does not magnify the rounding of a large logit. Where a temperature is
    the half, a quarter or an eighth of a higher one, squaring the higher one's weights replaces the
    exponential, which costs ten times as much.
    """
    logits = logits_NV.float()
    peak = logits.amax(-1, keepdim=True)
    distance = logits - peak
    weights = torch.empty_like(distance)
    by_temperature = {}
    for temperature, squarings in weight_plan(temperatures):
        if squarings:
            for _ in range(squarings):
                weights.square_()
        else:
            torch.div(distance, temperature, out=weights).exp_()
        by_temperature[temperature] = peak[:, 0] / temperature + weights.sum(-1).log()
    return [by_temperature[temperature] for temperature in temperatures]


def weight_plan(temperatures: Sequence[float]) -> list[tuple[float, int]]:
    """In which order to compute the weights exp(distance / T), and each one from which.

    Returns:
        (T, squarings) in descending order of T: how often to square the weights of the temperature before it;
        0 for an exponential of its own.
    """
    exact = last = math.inf
    plan = []
    for temperature in sorted(temperatures, reverse=True):
        squarings = math.log2(last / temperature) if exact <= MAX_SQUARED * temperature else 0.5
        if not squarings.is_integer():
            exact, squarings = temperature, 0
        plan.append((temperature, int(squarings)))
        last = temperature
    return plan


def sample_tail(weights_NV: torch.Tensor, shifts_N: torch.Tensor, count: int) -> torch.Tensor:
    """int32 [N, count]: ids drawn in proportion to `weights_NV` (float32, >= 0), ascending in each row.

    Inverse CDF at the points frac(shift + vdC(j)), in two levels: a float64 sum over blocks of columns finds
    the block, a float64 sum inside it the column. One pass over V; the error of a column's probability is
    that of a float32 sum of BLOCK terms (about 1e-6 relative), however large V is. A column of weight 0 is
    never drawn; a row without any weight gives NO_DRAW.
    """
    rows, vocab = weights_NV.shape
    # 1. The mass of each block of columns, and of the columns beside whole blocks, summed up along the row.
    whole = vocab // BLOCK * BLOCK
    blocks = weights_NV[:, :whole].reshape(rows, -1, BLOCK).sum(-1)
    sums = torch.cat([blocks, weights_NV[:, whole:].sum(-1, keepdim=True)], dim=-1)

    def inside(columns_NMC: torch.Tensor) -> torch.Tensor:
        return gather_columns(weights_NV, columns_NMC).masked_fill_(columns_NMC >= vocab, 0.0)

    return draw(sums, inside, shifts_N, count)


def draw(
    sums_NB: torch.Tensor,
    inside: Callable[[torch.Tensor], torch.Tensor],
    shifts_N: torch.Tensor,
    count: int,
) -> torch.Tensor:
    """The draws of `sample_tail` from the sums of the weights of each block of columns.

    `inside` gives the float32 weights of columns [N, M, C] of each row, and 0 for a column beyond the last.
    A block with a sum above 0 has to hold a weight above 0.
    """
    sums = sums_NB.double().cumsum(-1)
    # 2. The row's points: the low-discrepancy grid, moved by the row's shift and scaled to the row's mass.
    grid = torch.from_numpy(van_der_corput(count)).to(shifts_N.device)
    points = torch.sort((shifts_N[:, None] + grid) % 1.0, dim=-1).values
    target = _below(points * sums[:, -1:], sums[:, -1:])
    # 3. The block in which each point falls, and the mass in front of that block.
    block = torch.searchsorted(sums, target, right=True).clamp_max_(sums.shape[1] - 1)
    before = torch.where(block > 0, sums.gather(-1, (block - 1).clamp_min(0)), 0.0)
    # 4. The column within that block. Places beyond V weigh nothing, so that none of them is drawn.
    inner = inside(block_columns(block)).double().cumsum(-1)
    rest = _below(target - before, inner[..., -1])
    column = torch.searchsorted(inner, rest[..., None], right=True)[..., 0]
    ids = block * BLOCK + column
    return torch.where(sums[:, -1:] > 0, ids, NO_DRAW).int()


def block_columns(block: torch.Tensor) -> torch.Tensor:
    """int64 [..., C]: the columns of each block of `block` (int64 [...])."""
    return block[..., None] * BLOCK + torch.arange(BLOCK, device=block.device)


def gather_columns(values_NV: torch.Tensor, columns_NMC: torch.Tensor) -> torch.Tensor:
    """[N, M, C]: the values at these columns of each row; any of the row's for a column beyond the last."""
    rows, vocab = values_NV.shape
    flat = columns_NMC.clamp_max(vocab - 1).reshape(rows, -1)
    return values_NV.gather(-1, flat).reshape(columns_NMC.shape)


def _below(value: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """`value`, at most the next float below `limit`: the CDF then passes it at a column that has weight."""
    return torch.minimum(value, torch.nextafter(limit, torch.zeros_like(limit)))


def head_counts(head_logits_NK: torch.Tensor, lse_N: torch.Tensor, top_p: float | None) -> torch.Tensor:
    """int32 [N]: how many ranks of each row to keep; K for all rows when `top_p` is None."""
    rows, k = head_logits_NK.shape
    if top_p is None:
        return torch.full((rows,), k, dtype=torch.int32, device=head_logits_NK.device)
    mass_before = torch.cumsum(torch.exp(head_logits_NK - lse_N[:, None]), dim=-1)[:, :-1]
    return 1 + (mass_before < top_p).sum(-1, dtype=torch.int32)


@dataclass(frozen=True)
class HiddenRows:
    """Encoded hidden states of N rows, and what the encoding cost.

    values [N, D] in the stored type, or rows of bytes [N, W] for int4 and int2; scale float32 [N] for int8
    and fp8, else None. squared_error and squared_norm float32 [N]: sums over D of (stored - given)^2 and of
    given^2, both in float32.
    """

    values: torch.Tensor
    scale: torch.Tensor | None
    squared_error: torch.Tensor
    squared_norm: torch.Tensor


def encode_hidden(hidden_ND: torch.Tensor, dtype: str) -> HiddenRows:
    """Hidden states in their stored type, and the error of that against the values given.

    `bf16` and `f32` are plain casts. `int8` and `fp8` (e4m3fn) divide each row by its absolute maximum over
    the type's range: int8 is then within scale/2 per element, fp8 within 1/16 relative (or within
    scale * 2**-10 near 0). `int4` and `int2` make rows of bytes of them, see `pipeline.capture.rotated`.

    Raises:
        ValueError: unknown dtype.
    """
    if dtype not in HIDDEN_DTYPES:
        raise ValueError(f"unknown hidden dtype {dtype!r}")
    exact = hidden_ND.float()
    if dtype in ROTATED:
        rows, error = encode_rotated(exact, dtype)
        return HiddenRows(rows, None, error, exact.square().sum(-1))
    scale = None
    if dtype == "bf16":
        values = hidden_ND.to(torch.bfloat16)
    elif dtype == "f32":
        values = exact
    else:
        top = INT8_MAX if dtype == "int8" else FP8_MAX
        scale = exact.abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny * top) / top
        scaled = exact / scale[:, None]
        values = scaled.round().to(torch.int8) if dtype == "int8" else scaled.to(torch.float8_e4m3fn)
    stored = values.float() if scale is None else values.float() * scale[:, None]
    return HiddenRows(values, scale, (stored - exact).square().sum(-1), exact.square().sum(-1))
