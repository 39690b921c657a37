"""Several teachers' sparse distributions as one, the mixture p = sum of w_i p_i, on the device of the parts
and without a loop over rows.

What a cache knows of teacher i at a position is a sparse measure m_i: p_i itself in the columns of its head,
and on its draws the weights whose mean over draws is p_i outside that head. So E[m_i(v)] = p_i(v) for every
token v, and for m = sum of w_i m_i, by linearity and whatever the draws of different teachers have to do with
each other, E[m(v)] = p(v): value and gradient of a loss that is linear in p are unbiased, and exact where no
teacher's part was drawn. A token in the heads of all teachers has its mixture exactly; one in some heads only
has the parts of these exactly, and those of the others as far as they drew it.

A teacher without draws is another matter. What it says of its tail is a mass and no token: of a token that
another teacher's head holds nobody knows how much of that mass belongs to it, and neither 0 nor any share of
it is an estimate. Such caches are no part of a mixture, unless their heads are the whole vocabulary (the
mass outside is then rounding); see `student.training.teachers`.

What is not linear in p: the entropy H. Of a mixture it is not known, and the mean of the teachers', sum of
w_i H(p_i), stands in its place. Then `forward_kl` is sum of w_i KL(p_i || q), an unbiased estimate, which is
KL(p || q) and the Jensen-Shannon divergence of the teachers, a constant: the gradient is that of KL(p || q).

Shape letters: N positions, K columns of a part, C columns of all parts together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from student.data.columns import PADDING, best_first, first_of_runs, run_sums
from student.losses.sparse import SparseTargets


def mixture(parts: Sequence[SparseTargets], weights: Sequence[float]) -> SparseTargets:
    """The mixture of what `decode_targets` gives of the same N positions of several caches.

    Args:
        parts: one for each teacher, on one device.
        weights: a share for each, 1 together; a part of share 0 is left out.

    Returns:
        Targets of C columns, each token in one of them: losses sum squares and set gradients by column. All
        columns count as draws, since any may hold what was drawn; the first is the token to which the heads
        alone give most. entropy_N is the mean of the teachers'. There is nothing tempered, since draws say
        nothing at other temperatures.

    Example:
        targets = mixture([decode_targets(coded, label_N) for coded in both], (0.5, 0.5))
    """
    some = [(part, weight) for part, weight in zip(parts, weights, strict=True) if weight]
    parts, weights = [part for part, _ in some], [weight for _, weight in some]
    real = [torch.isfinite(part.logprob_NK) for part in parts]
    ids_NC = torch.cat(
        [part.ids_NK.masked_fill(~known, PADDING) for part, known in zip(parts, real, strict=True)], -1
    )
    mass_NC = torch.cat(
        [part.logprob_NK.exp() * weight for part, weight in zip(parts, weights, strict=True)], -1
    )
    drawn_C = torch.cat([_drawn(part) for part in parts])
    ids_NC, order_NC = ids_NC.sort(dim=-1, stable=True)
    mass_NC = mass_NC.gather(-1, order_NC)
    head_NC = mass_NC.masked_fill(drawn_C[order_NC], 0.0)
    # A token is in one column of each part at most, so that a run of equal ids is that long.
    first_NC = first_of_runs(ids_NC)
    mass_NC = run_sums(mass_NC, ids_NC, len(parts)).masked_fill(~first_NC, 0.0)
    head_NC = run_sums(head_NC, ids_NC, len(parts)).masked_fill(~first_NC, -1.0)
    ids_NC, mass_NC = best_first(head_NC, ids_NC, mass_NC)
    return SparseTargets(
        ids_NK=torch.where(mass_NC > 0, ids_NC, ids_NC[:, :1]),
        logprob_NK=mass_NC.log(),
        tail_N=mixed_logs([part.tail_N for part in parts], weights),
        label_N=parts[0].label_N,
        entropy_N=torch.stack([_entropy(p) * w for p, w in zip(parts, weights, strict=True)]).sum(0),
        draws=ids_NC.shape[1],
    )


def mixed_logs(logs: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """log of sum of w_i exp(l_i), in the shape of each l_i; NaN where one of weight above 0 is."""
    weighted = [part + math.log(weight) for part, weight in zip(logs, weights, strict=True) if weight]
    return torch.stack(weighted).logsumexp(0)


def _drawn(part: SparseTargets) -> Tensor:
    """bool [K]: the columns that may hold draws."""
    columns = part.ids_NK.shape[1]
    return torch.arange(columns, device=part.ids_NK.device) >= part.head_columns


def _entropy(part: SparseTargets) -> Tensor:
    """Entropy of the teacher in nats, [N]: as stored of rows with draws, else that of head and bucket."""
    logs_NC = torch.cat([part.logprob_NK, part.tail_N.unsqueeze(-1)], -1)
    coarse_N = -(logs_NC.exp() * logs_NC.masked_fill(torch.isneginf(logs_NC), 0.0)).sum(-1)
    if part.entropy_N is None:
        return coarse_N
    return torch.where(torch.isnan(part.entropy_N), coarse_N, part.entropy_N)
