"""Losses on the order and the differences of the head's logits. What lies outside the head takes no part.

The losses of the papers, restricted to the tokens that the teacher ranks first. A constant added to all
logits changes none of them, so that log p stands for the teacher's logits.

Shape letters: N positions, K head columns (padded), P pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus

from student.losses.sparse import ReducedLogits, SparseTargets


def top1(student: ReducedLogits, teacher: SparseTargets) -> Tensor:
    """-log q of the teacher's most likely token, [N], exact: hard-label distillation (arXiv:2012.12877)."""
    return student.lse() - student.head_NK[:, 0]


def logit_mse(student: ReducedLogits, teacher: SparseTargets) -> Tensor:
    """Mean over the head of the squared difference of logits, each side less its mean over the head, [N]
    (arXiv:2105.08919 on all logits).

    Times the number of tokens, a lower bound of the sum over the whole vocabulary: a subset's own mean
    minimises its sum of squares, and dropping tokens drops terms >= 0.
    """
    k = teacher.head_columns
    real_NK = torch.isfinite(teacher.logprob_NK[:, :k])
    count_N1 = real_NK.sum(-1, keepdim=True)
    gap_NK = torch.where(real_NK, student.head_NK[:, :k] - teacher.logprob_NK[:, :k], 0.0)
    centred_NK = torch.where(real_NK, gap_NK - gap_NK.sum(-1, keepdim=True) / count_N1, 0.0)
    return centred_NK.square().sum(-1) / count_N1.squeeze(-1)


def hinge_ranking(
    student: ReducedLogits, teacher: SparseTargets, margin: float = 1.0, top: int = 32
) -> Tensor:
    """Mean over pairs (i, j), i ahead of j for the teacher, of max(0, margin - (z_i - z_j)), [N].

    Pairs of the teacher's `top` best tokens, as far as the head holds them; equal ones make no pair. The
    store keeps logits in steps of 1/16 nat, so that tokens nearer to each other than that can come out equal.
    """
    gap_NP, pair_NP = _pairs(student, teacher, top)
    return _mean(relu(margin - gap_NP), pair_NP)


def logistic_ranking(student: ReducedLogits, teacher: SparseTargets, top: int = 32) -> Tensor:
    """Mean over the same pairs of log(1 + exp(-(z_i - z_j))), [N] (RankNet, Burges et al. 2005)."""
    gap_NP, pair_NP = _pairs(student, teacher, top)
    return _mean(softplus(-gap_NP), pair_NP)


def _pairs(student: ReducedLogits, teacher: SparseTargets, top: int) -> tuple[Tensor, Tensor]:
    """(z_i - z_j, whether the teacher ranks i ahead of j) for all i < j, each [N, P]."""
    k = min(teacher.head_columns, top)
    first_P, second_P = torch.triu_indices(k, k, 1, device=teacher.ids_NK.device)
    logprob_NK = teacher.logprob_NK[:, :k]
    z_NK = student.head_NK[:, :k].masked_fill(~torch.isfinite(logprob_NK), 0.0)
    ahead_NP = (logprob_NK[:, first_P] > logprob_NK[:, second_P]) & torch.isfinite(logprob_NK[:, second_P])
    return z_NK[:, first_P] - z_NK[:, second_P], ahead_NP


def _mean(values_NP: Tensor, taken_NP: Tensor) -> Tensor:
    return torch.where(taken_NP, values_NP, 0.0).sum(-1) / taken_NP.sum(-1).clamp_min(1)
