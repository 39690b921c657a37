"""Divergences between teacher and student, coarse-grained to the head's tokens and one bucket for the rest.

Every f-divergence D(p, q) = sum q f(p / q), f convex, can only fall when outcomes are merged (data
processing: f of a mean is at most the mean of f). So each such loss here is a lower bound of the one over
the whole vocabulary, equal where the head is the whole vocabulary or p / q is the same all over the tail,
and zero only if student and teacher agree on the head. Draws belong to the bucket: they estimate sums that
are linear in p, as that of the forward KL, and these are not.

Temperature T: both distributions are softmax(logits / T), and the loss is multiplied by T^2, which keeps the
size of its gradient (Hinton et al., arXiv:1503.02531).

Shape letters: N positions, K head columns (padded), C = K + 1 outcomes, the bucket last.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from student.losses.sparse import ReducedLogits, SparseTargets, forward_kl

# The logarithm of no probability: exp gives 0 in every dtype, and unlike -inf it subtracts to 0.
NOTHING = -1e4
# Of a tail that the capture could not tell from nothing in float32: what is below e^-16 was rounded away.
CLOSED_TAIL = -20.0


def coarse(student: ReducedLogits, teacher: SparseTargets, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """(log p, log q), each [N, C]; NOTHING in columns that are padding."""
    k = teacher.head_columns
    if temperature == 1.0:
        log_p_NK, tail_N = teacher.logprob_NK, teacher.tail_N
        rest_N = torch.logsumexp(torch.cat([log_p_NK[:, k:], tail_N.unsqueeze(-1)], -1), -1)
    else:
        tempered = teacher.tempered[temperature]
        log_p_NK, rest_N = tempered.logprob_NK, tempered.tail_N
    real_NK = torch.isfinite(teacher.logprob_NK[:, :k])
    outside = [student.head_NK[:, k:] / temperature, student.tail_at(temperature).unsqueeze(-1)]
    bucket_N1 = _logsumexp(torch.cat(outside, -1)).unsqueeze(-1)
    log_q_NC = torch.cat([student.head_NK[:, :k] / temperature, bucket_N1], -1).log_softmax(-1)
    has_bucket_N1 = torch.isfinite(bucket_N1.detach())
    real_NC = torch.cat([real_NK, has_bucket_N1], -1)
    rest_N1 = rest_N.unsqueeze(-1).masked_fill(torch.isneginf(rest_N.unsqueeze(-1)), CLOSED_TAIL)
    log_p_NC = torch.cat([log_p_NK[:, :k], rest_N1], -1).masked_fill(~real_NC, NOTHING)
    return log_p_NC, log_q_NC.masked_fill(~real_NC, NOTHING)


def tempered_kl(student: ReducedLogits, teacher: SparseTargets, temperature: float = 1.0) -> Tensor:
    """T^2 KL(p || q) in nats, [N]. At T = 1 `forward_kl`, which makes use of draws; else a lower bound."""
    if temperature == 1.0:
        return forward_kl(student, teacher)
    return temperature**2 * _kl(*coarse(student, teacher, temperature))


def reverse_kl(student: ReducedLogits, teacher: SparseTargets, temperature: float = 1.0) -> Tensor:
    """T^2 KL(q || p) in nats, [N], a lower bound (MiniLLM, arXiv:2306.08543)."""
    log_p_NC, log_q_NC = coarse(student, teacher, temperature)
    return temperature**2 * _kl(log_q_NC, log_p_NC)


def jsd(
    student: ReducedLogits, teacher: SparseTargets, beta: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """T^2 (beta KL(p || m) + (1 - beta) KL(q || m)), m = beta p + (1 - beta) q, [N], a lower bound (the
    generalised JSD of GKD, arXiv:2306.13649; the common one at beta = 1/2).
    """
    log_p_NC, log_q_NC = coarse(student, teacher, temperature)
    log_m_NC = _mixture(log_p_NC, log_q_NC, beta)
    return temperature**2 * (beta * _kl(log_p_NC, log_m_NC) + (1 - beta) * _kl(log_q_NC, log_m_NC))


def skew_kl(
    student: ReducedLogits, teacher: SparseTargets, alpha: float = 0.1, temperature: float = 1.0
) -> Tensor:
    """T^2 KL(p || alpha p + (1 - alpha) q), [N], a lower bound (DistiLLM, arXiv:2402.03898)."""
    log_p_NC, log_q_NC = coarse(student, teacher, temperature)
    return temperature**2 * _kl(log_p_NC, _mixture(log_p_NC, log_q_NC, alpha))


def skew_reverse_kl(
    student: ReducedLogits, teacher: SparseTargets, alpha: float = 0.1, temperature: float = 1.0
) -> Tensor:
    """T^2 KL(q || (1 - alpha) p + alpha q), [N], a lower bound (DistiLLM, arXiv:2402.03898)."""
    log_p_NC, log_q_NC = coarse(student, teacher, temperature)
    return temperature**2 * _kl(log_q_NC, _mixture(log_q_NC, log_p_NC, alpha))


def adaptive_kl(
    student: ReducedLogits, teacher: SparseTargets, mu: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """T^2 (w KL(p || q) + (1 - w) KL(q || p)), [N] (AKL, arXiv:2404.02657).

    w is the share of sum |p - q| that falls on the teacher's best tokens, the fewest of mass >= mu. Computed
    on the coarse distributions, where the bucket counts as one token outside those, so that it bounds
    nothing. No gradient flows through w.
    """
    log_p_NC, log_q_NC = coarse(student, teacher, temperature)
    p_NC = log_p_NC.exp()
    gap_NC = (p_NC - log_q_NC.detach().exp()).abs()
    best_NC = (p_NC.cumsum(-1) - p_NC) < mu
    best_NC[:, -1] = False
    share_N = (gap_NC * best_NC).sum(-1) / gap_NC.sum(-1).clamp_min(torch.finfo(gap_NC.dtype).tiny)
    forward_N, reverse_N = _kl(log_p_NC, log_q_NC), _kl(log_q_NC, log_p_NC)
    return temperature**2 * (share_N * forward_N + (1 - share_N) * reverse_N)


def confidence_kl(student: ReducedLogits, teacher: SparseTargets, confidence: float) -> Tensor:
    """gamma KL(q || p) + (1 - gamma) KL(p || q), [N] (CAKLD of BitDistiller, arXiv:2402.10631).

    gamma: the teacher's mean probability of the next token, one number for the whole training, so that a sure
    teacher makes the student seek modes. The reverse part is a lower bound; the forward part is `forward_kl`.
    """
    return confidence * reverse_kl(student, teacher) + (1 - confidence) * forward_kl(student, teacher)


def total_variation(student: ReducedLogits, teacher: SparseTargets) -> Tensor:
    """1/2 sum |p - q|, [N], in [0, 1], a lower bound (arXiv:2307.15190)."""
    log_p_NC, log_q_NC = coarse(student, teacher)
    return 0.5 * (log_p_NC.exp() - log_q_NC.exp()).abs().sum(-1)


def _kl(log_a_NC: Tensor, log_b_NC: Tensor) -> Tensor:
    return (log_a_NC.exp() * (log_a_NC - log_b_NC)).sum(-1)


def _mixture(log_a_NC: Tensor, log_b_NC: Tensor, share: float) -> Tensor:
    """log(share a + (1 - share) b), share in (0, 1)."""
    return torch.logaddexp(log_a_NC + math.log(share), log_b_NC + math.log1p(-share))


def _logsumexp(values_NC: Tensor) -> Tensor:
    """Over the last dimension, with a gradient of 0, not NaN, in rows of nothing but -inf."""
    empty_N1 = torch.isneginf(values_NC.detach()).all(-1, keepdim=True)
    sums_N = torch.logsumexp(values_NC.masked_fill(empty_N1, 0.0), -1)
    return sums_N.masked_fill(empty_N1.squeeze(-1), -torch.inf)
