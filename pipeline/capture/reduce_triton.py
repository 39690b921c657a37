"""The reduction of reduce.py on a GPU: a Triton kernel reads the logits, and the searches use what it found.

reduce.py is the reference and what CPUs run. Its passes over a row's logits (float32 copy, maxima, distances,
exponentials, sums, and three more for each temperature) each go through memory. Here one program per row
walks along the vocabulary in tiles of LANES blocks and loads each logit once, in its own type: 2 bytes per
logit for bfloat16, 4 for float32. It writes 8 bytes per block of 64 logits.

Afterwards reduce.py's own searches load the logits of the blocks that they look into: K blocks for the top
and, with a tail, K + M more. Where K blocks are more than half of all, the search for the top reads the whole
row once more instead.

Nothing here was run on a GPU by us. The kernel is tested in Triton's interpreter, and compiled for GPUs: its
arithmetic is known, its speed is not. Compiled, an exponential is the GPU's approximate one (ex2.approx.ftz),
where the interpreter takes NumPy's. No two programs write the same number, so that their order changes
nothing; a draw also needs a cumulative sum of torch's, whose order on CUDA may change from run to run.

Shapes: N rows, V vocabulary, B blocks of C = BLOCK columns, the last one maybe partial, L lanes (blocks of a
tile), T temperatures, K head size, M tail draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import no_type_check

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]

from distily.logs import LOG
from distily.text import one_line
from pipeline.capture.reduce import (
    BLOCK,
    FARTHEST,
    LogitRows,
    block_columns,
    draw,
    gather_columns,
    head_counts,
    label_logprobs,
    top,
    weight_plan,
)

# A tile is 64 blocks of 64 columns: 16 logits for each thread of 8 warps. Not tuned, for want of a GPU.
LANES = 64
WARPS = 8
# Where all of a block is masked out, distances are taken from here, since -inf less -inf is NaN.
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@dataclass(frozen=True, kw_only=True)
class Scan:
    """What one pass over N rows of logits finds; all float32.

    maxima [N, B]: the largest logit of each block; sums [N, B]: the sum over a block of exp(logit - maximum),
    0 for a block without mass. peak [N]: the largest logit of each row; norms [N, T]: the sum over a row of
    exp((logit - peak) / T), in the order of `temperatures`, NaN for a row without mass. moment [N]: the sum
    over a row of (logit - peak) * exp(logit - peak). picked [N]: the logit of each label, -inf where there is
    none.
    """

    maxima: torch.Tensor
    sums: torch.Tensor
    peak: torch.Tensor
    moment: torch.Tensor
    picked: torch.Tensor
    norms: torch.Tensor
    temperatures: tuple[float, ...]

    def lse(self, temperature: float) -> torch.Tensor:
        """float32 [N]: logsumexp(logits / temperature), for one of `temperatures`."""
        return self.peak / temperature + self.norms[:, self.temperatures.index(temperature)].log()


# Labels are one load a row: a kernel of its own for each alignment of theirs would gain nothing.
@triton.jit(do_not_specialize_on_alignment=["labels_N"])  # type: ignore[untyped-decorator, unused-ignore]
@no_type_check
def scan_kernel(
    logits_NV,
    labels_N,
    maxima_NB,
    sums_NB,
    peak_N,
    moment_N,
    picked_N,
    norms_NT,
    row_stride,
    vocab,
    blocks,
    RATES: tl.constexpr,
    SQUARINGS: tl.constexpr,
    UNIT: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    FARTHEST: tl.constexpr,
):
    """One program per row. RATES are log2(e) / T, and RATES[UNIT] is that of T = 1.

    A block's weights are relative to the block's own maximum, which is known as soon as its tile is there.
    Each lane adds up its blocks relative to the largest maximum that it has met itself, so that lanes need
    not wait for one another before the end.
    """
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_N + row)
    lane_L = tl.arange(0, LANES)
    peak_L = tl.full([LANES], float("-inf"), tl.float32)
    moment_L = tl.zeros([LANES], tl.float32)
    totals_TL = (tl.zeros([LANES], tl.float32),) * len(RATES)
    picked = float("-inf")
    for first in range(0, blocks, LANES):
        # The only load of these logits.
        block_L = first + lane_L
        column_LC = block_L[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        address_LC = logits_NV + row * row_stride + column_LC
        logits_LC = tl.load(address_LC, mask=column_LC < vocab, other=float("-inf")).to(tl.float32)
        if (label >= first * BLOCK) & (label < (first + LANES) * BLOCK):
            picked = tl.max(tl.max(tl.where(column_LC == label, logits_LC, float("-inf")), 1), 0)
        # Two steps down from the lane's new peak: to its old one, and to the block's maximum.
        largest_L = tl.max(logits_LC, 1)
        higher_L = tl.maximum(peak_L, largest_L)
        old_step_L = peak_L - tl.maximum(higher_L, LOWEST)
        new_step_L = largest_L - tl.maximum(higher_L, LOWEST)
        distance_LC = logits_LC - tl.maximum(largest_L, LOWEST)[:, None]
        weights_LC = distance_LC
        updated_TL = ()
        for i in tl.static_range(len(RATES)):
            # An exponential per logit, or squares of those of a higher temperature.
            if SQUARINGS[i] == 0:
                weights_LC = tl.exp2(distance_LC * RATES[i])
            for _ in tl.static_range(tl.constexpr(SQUARINGS[i])):
                weights_LC = weights_LC * weights_LC
            sum_L = tl.sum(weights_LC, 1)
            old_L = tl.exp2(old_step_L * RATES[i])
            new_L = tl.exp2(new_step_L * RATES[i])
            if i == UNIT:
                tl.store(maxima_NB + row * blocks + block_L, largest_L, mask=block_L < blocks)
                tl.store(sums_NB + row * blocks + block_L, sum_L, mask=block_L < blocks)
                within_L = tl.sum(weights_LC * tl.maximum(distance_LC, FARTHEST), 1)
                before_L = moment_L + tl.maximum(old_step_L, FARTHEST) * totals_TL[i]
                within_L += tl.maximum(new_step_L, FARTHEST) * sum_L
                moment_L = before_L * old_L + within_L * new_L
            updated_TL += (totals_TL[i] * old_L + sum_L * new_L,)
        totals_TL = updated_TL
        peak_L = higher_L
    # The lanes of the row together; without any mass, the step is -inf less -inf, and the row not a number.
    peak = tl.max(peak_L, 0)
    step_L = peak_L - peak
    for i in tl.static_range(len(RATES)):
        factor_L = tl.exp2(step_L * RATES[i])
        tl.store(norms_NT + row * len(RATES) + i, tl.sum(totals_TL[i] * factor_L, 0))
        if i == UNIT:
            moment_L += tl.maximum(step_L, FARTHEST) * totals_TL[i]
            tl.store(moment_N + row, tl.sum(moment_L * factor_L, 0))
    tl.store(peak_N + row, peak)
    tl.store(picked_N + row, picked)


def scan(logits_NV: torch.Tensor, labels_N: torch.Tensor, temperatures: Sequence[float]) -> Scan:
    """Read the logits once; T = 1 is always among the temperatures of the result.

    Args:
        logits_NV: any float dtype of at most 32 bits; the columns of a row lie side by side.
        labels_N: int64 id of the token that follows each row; negative where there is none.
        temperatures: at which to sum the weights of each row.
    """
    assert logits_NV.stride(1) == 1 or logits_NV.shape[1] == 1
    rows, vocab = logits_NV.shape
    blocks = triton.cdiv(vocab, BLOCK)
    # Draws and entropy rest on the weights of T = 1, which are therefore exponentials and never squares.
    plan = weight_plan([t for t in temperatures if t > 1])
    plan += weight_plan([1.0, *(t for t in temperatures if t < 1)])

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=logits_NV.device)

    found = Scan(
        maxima=empty(rows, blocks),
        sums=empty(rows, blocks),
        peak=empty(rows),
        moment=empty(rows),
        picked=empty(rows),
        norms=empty(rows, len(plan)),
        temperatures=tuple(temperature for temperature, _ in plan),
    )
    with torch.cuda.device_of(logits_NV):  # type: ignore[no-untyped-call]
        scan_kernel[(rows,)](
            logits_NV,
            labels_N.contiguous(),
            found.maxima,
            found.sums,
            found.peak,
            found.moment,
            found.picked,
            found.norms,
            logits_NV.stride(0),
            vocab,
            blocks,
            RATES=tuple(math.log2(math.e) / temperature for temperature, _ in plan),
            SQUARINGS=tuple(squarings for _, squarings in plan),
            UNIT=found.temperatures.index(1.0),
            LANES=LANES,
            BLOCK=BLOCK,
            FARTHEST=FARTHEST,
            num_warps=WARPS,
        )
    return found


def agrees(device: torch.device) -> bool:
    """Whether the kernel runs on a device and finds there what torch does, asked of a small sample.

    Where not, a warning says why: a C compiler that Triton needs may be missing, and not every GPU was tried.
    """
    logits_NV = torch.randn(7, 1003, generator=torch.Generator().manual_seed(0)).mul_(4).to(device)
    labels_N, whole = torch.arange(7, device=device) * 100, 1003 // BLOCK * BLOCK
    reason = "its results differ from those of torch"
    try:
        found = scan(logits_NV, labels_N, (1.0, 2.0))
        # Float32 sums of 1,003 weights in any order: 1003 * 2**-24 < 1e-4 nats.
        right = all(
            torch.allclose(found.lse(T), (logits_NV.double() / T).logsumexp(-1).float(), rtol=0, atol=1e-4)
            for T in (1.0, 2.0)
        )
        largest_NB = logits_NV[:, :whole].reshape(7, -1, BLOCK).amax(-1)
        right = right and torch.equal(found.maxima[:, : whole // BLOCK], largest_NB)
        right = right and torch.equal(found.picked, logits_NV.gather(-1, labels_N[:, None])[:, 0])
    except Exception as error:  # of the compiler, the driver or Triton itself
        right, reason = False, one_line(error)
    if not right:
        LOG.warning("logits are reduced without the Triton kernel, which takes longer: %s", reason)
    return right


def reduce_scanned(
    logits_NV: torch.Tensor,
    labels_N: torch.Tensor,
    found: Scan,
    top_k: int,
    top_p: float | None,
    tail: int = 0,
    shifts_N: torch.Tensor | None = None,
) -> LogitRows:
    """What `reduce_logits` returns, from the logits and what `scan` has found in them."""
    head_logits, head_ids = top(logits_NV, top_k, found.maxima)
    lse = found.lse(1.0)
    # H = log(norm) - E[distance to the top], as in reduce.py.
    norm = found.norms[:, found.temperatures.index(1.0)]
    entropy = (norm.log() - found.moment / norm).clamp_min(0.0)
    counts = head_counts(head_logits, lse, top_p)
    draws = None
    if tail:
        assert shifts_N is not None
        inside = torch.arange(top_k, device=counts.device) < counts[:, None]
        draws = _draw_tail(logits_NV, found, head_ids, inside, shifts_N.to(logits_NV.device), tail)
    return LogitRows(
        counts=counts,
        head_ids=head_ids.int(),
        head_logits=head_logits,
        lse=lse,
        label_logprob=label_logprobs(found.picked, lse, labels_N),
        entropy=entropy,
        tail_draws=draws,
    )


def _draw_tail(
    logits_NV: torch.Tensor,
    found: Scan,
    head_ids_NK: torch.Tensor,
    inside_NK: torch.Tensor,
    shifts_N: torch.Tensor,
    count: int,
) -> torch.Tensor:
    """int32 [N, M]: draws from the row without those of its head that are `inside`."""
    vocab = logits_NV.shape[1]
    peak = found.peak[:, None]
    # A bit for each column of a block: whether the head has it. Its ids are distinct: sums are unions.
    block_NK, column_NK = head_ids_NK // BLOCK, head_ids_NK % BLOCK
    bit_NK = torch.ones_like(column_NK).bitwise_left_shift(column_NK).masked_fill_(~inside_NK, 0)
    taken_NB = torch.zeros_like(found.sums, dtype=torch.int64).scatter_add_(-1, block_NK, bit_NK)

    def weights(columns_NMC: torch.Tensor) -> torch.Tensor:
        exact = torch.exp(gather_columns(logits_NV, columns_NMC).float() - peak[..., None])
        taken = taken_NB.gather(-1, columns_NMC[..., 0] // BLOCK)[..., None]
        is_taken = taken.bitwise_right_shift(columns_NMC % BLOCK).bitwise_and(1) == 1
        return exact.masked_fill_(is_taken | (columns_NMC >= vocab), 0.0)

    # A head's mass may be nearly all of its block's: what is left is summed anew, not found by subtraction.
    sums = found.sums * torch.exp(found.maxima - peak)
    sums.scatter_(-1, block_NK, weights(block_columns(block_NK)).sum(-1))
    return draw(sums, weights, shifts_N, count)
