"""Optimal-transport losses on the head.

Shape letters: N positions, K head columns (padded), k of them that take part.
"""

from __future__ import annotations

import torch
from torch import Tensor

from student.losses.divergences import coarse
from student.losses.sparse import ReducedLogits, SparseTargets


def sinkhorn(
    student: ReducedLogits,
    teacher: SparseTargets,
    regularisation: float = 0.1,
    iterations: int = 20,
    top: int = 32,
    temperature: float = 1.0,
) -> Tensor:
    """sum_ij P_ij |p_i - q_j|, [N], of the teacher's `top` best tokens (SinKD, arXiv:2402.17110).

    P starts as exp(-|p_i - q_j| / regularisation), and its rows and columns are scaled to sum one in turn,
    `iterations` times; gradients flow through that. This is the paper's form for each position by itself.
    Its form over a batch compares positions with each other over the whole vocabulary, of which a cached row
    holds the head only; it is not here. Tokens outside the head take no part, and nothing is bounded.
    """
    k = min(teacher.head_columns, top)
    log_p_NC, log_q_NC = coarse(student, teacher, temperature)
    p_Nk, q_Nk = log_p_NC[:, :k].exp(), log_q_NC[:, :k].exp()
    real_Nk = torch.isfinite(teacher.logprob_NK[:, :k])
    cost_Nkk = (p_Nk.unsqueeze(-1) - q_Nk.unsqueeze(-2)).abs()
    both_Nkk = real_Nk.unsqueeze(-1) & real_Nk.unsqueeze(-2)
    plan_Nkk = torch.where(both_Nkk, (-cost_Nkk / regularisation).exp(), 0.0)
    for _ in range(iterations):
        plan_Nkk = _scaled(_scaled(plan_Nkk, -1), -2)
    return (plan_Nkk * cost_Nkk).sum((-1, -2))


def _scaled(plan_Nkk: Tensor, dim: int) -> Tensor:
    """Divided by its sums along `dim`; padding, of sum 0, stays as it is."""
    sums = plan_Nkk.sum(dim, keepdim=True)
    return plan_Nkk / sums.masked_fill(sums == 0, 1.0)


def universal_logit(student: ReducedLogits, teacher: SparseTargets) -> Tensor:
    """sum_i |p_(i) - q_(i)| of the probabilities in descending order, whatever their tokens, [N] (ULD,
    arXiv:2402.12030).

    The head is the teacher's beginning of that order; the student's is found in all of its logits. What
    comes after the row's head is one summand, |sum p - sum q|, by the triangle inequality at most the sum of
    the many: a lower bound, exact where the head is the whole vocabulary.
    """
    assert student.top_NK is not None
    k = student.top_NK.shape[1]
    logprob_NK = (teacher.logprob_NK if teacher.ranked_NK is None else teacher.ranked_NK)[:, :k]
    real_NK = torch.isfinite(logprob_NK)
    p_NK = logprob_NK.exp()
    q_NK = torch.where(real_NK, (student.top_NK - student.lse().unsqueeze(-1)).exp(), 0.0)
    rest_N = (q_NK - p_NK).sum(-1)  # (1 - sum p) - (1 - sum q)
    return (p_NK - q_NK).abs().sum(-1) + rest_N.abs()
