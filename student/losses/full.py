"""Losses between two full distributions over the vocabulary, each with its gradient written out.

Every loss takes one chunk of rows and returns (value [n], gradient with respect to the student's logits
[n, V]), so that `student.losses.full_pass` needs no autograd graph over n x V. A divergence sees the pair of
distributions at one temperature T and returns its slope s with respect to log q, as if these were free;
through the softmax that is d value / d z = (s - q * sum s) / T. `tempered` does this, and multiplies by T^2,
so that gradients keep their size (Hinton et al. 2015, arXiv:1503.02531).

p is the teacher, q the student, z their logits. Shape letters: n positions of a chunk, V vocabulary.
"""

# ruff: noqa: N815  (shape suffixes on dataclass fields)
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, wraps

import torch
from torch import Tensor

ValueAndSlope = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Pair:
    """Log-probabilities [n, V] of teacher (p) and student (q)."""

    log_p: Tensor
    log_q: Tensor

    @cached_property
    def p(self) -> Tensor:
        return self.log_p.exp()

    @cached_property
    def q(self) -> Tensor:
        return self.log_q.exp()


@dataclass(frozen=True)
class Rows:
    """A chunk's logits on both sides, float32 or float64 [n, V], to be read only."""

    student_nV: Tensor
    teacher_nV: Tensor
    _pairs: dict[float, Pair] = field(default_factory=dict)

    def at(self, temperature: float) -> Pair:
        """Both distributions at a temperature, computed once."""
        if temperature not in self._pairs:
            log_p, log_q = (
                torch.log_softmax(side / temperature, -1) for side in (self.teacher_nV, self.student_nV)
            )
            self._pairs[temperature] = Pair(log_p, log_q)
        return self._pairs[temperature]


DenseLoss = Callable[[Rows], ValueAndSlope]


def tempered(divergence: Callable[..., ValueAndSlope]) -> Callable[..., ValueAndSlope]:
    """Make (pair, **options) -> (value, slope in log q) into a loss: (rows, temperature=1.0, **options) ->
    (T^2 value, slope in z).
    """

    @wraps(divergence)
    def loss(rows: Rows, temperature: float = 1.0, **options: float) -> ValueAndSlope:
        pair = rows.at(temperature)
        value_n, slope = divergence(pair, **options)
        slope.addcmul_(pair.q, slope.sum(-1, keepdim=True), value=-1.0)
        return temperature**2 * value_n, slope.mul_(temperature)

    return loss


@tempered
def forward_kl(pair: Pair) -> ValueAndSlope:
    """KL(p || q) in nats."""
    return _forward_kl(pair)


@tempered
def reverse_kl(pair: Pair) -> ValueAndSlope:
    """KL(q || p) in nats (MiniLLM, arXiv:2306.08543, on the teacher's text)."""
    return _reverse_kl(pair)


@tempered
def jsd(pair: Pair, beta: float = 0.5) -> ValueAndSlope:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q, 0 < beta < 1, in nats.

    beta = 1/2 is the Jensen-Shannon divergence. Divided by beta it tends to KL(p || q) for beta -> 0, and
    divided by 1 - beta to KL(q || p) for beta -> 1 (GKD, arXiv:2306.13649).
    """
    log_m = _log_mix(pair, beta)
    own = (pair.log_q - log_m).mul_(pair.q).mul_(1.0 - beta)
    return beta * (pair.p * (pair.log_p - log_m)).sum(-1) + own.sum(-1), own


@tempered
def skew_kl(pair: Pair, alpha: float = 0.1) -> ValueAndSlope:
    """KL(p || alpha p + (1 - alpha) q), 0 < alpha < 1 (DistiLLM, arXiv:2402.03898)."""
    log_m = _log_mix(pair, alpha)
    value_n = (pair.p * (pair.log_p - log_m)).sum(-1)
    return value_n, (pair.log_q - log_m).exp_().mul_(pair.p).mul_(alpha - 1.0)


@tempered
def skew_reverse_kl(pair: Pair, alpha: float = 0.1) -> ValueAndSlope:
    """KL(q || (1 - alpha) p + alpha q), 0 < alpha < 1 (DistiLLM, arXiv:2402.03898)."""
    gap = pair.log_q - _log_mix(pair, 1.0 - alpha)
    value_n = (pair.q * gap).sum(-1)
    return value_n, (gap + 1.0).sub_(gap.exp_(), alpha=alpha).mul_(pair.q)


@tempered
def adaptive_kl(pair: Pair, mu: float = 0.5) -> ValueAndSlope:
    """(g_h KL(p || q) + g_t KL(q || p)) / (g_h + g_t), g the sum of |p - q| over the teacher's head or tail.

    The head is the fewest most likely tokens that reach `mu` (and those as likely as the last of
    them); the weights g are constants to the gradient (AKL, arXiv:2404.02657).
    """
    gap = (pair.p - pair.q).abs_()
    whole_n = gap.sum(-1)
    head_n = gap.mul_(pair.p >= _last_of_head(pair.p, mu).unsqueeze(-1)).sum(-1)
    share_n = torch.where(whole_n > 0, head_n / whole_n, 0.5)
    return _blend(pair, share_n)


@tempered
def confidence_kl(pair: Pair, confidence: float) -> ValueAndSlope:
    """gamma KL(q || p) + (1 - gamma) KL(p || q), gamma in [0, 1]: the teacher's mean probability of the next
    token, one number for the whole training (CAKLD of BitDistiller, arXiv:2402.10631).
    """
    return _blend(pair, pair.log_p.new_full((len(pair.log_p),), 1.0 - confidence))


@tempered
def total_variation(pair: Pair) -> ValueAndSlope:
    """Total variation distance, sum |p - q| / 2, in [0, 1] (f-DISTILL, arXiv:2307.15190)."""
    gap = pair.q - pair.p
    return gap.abs().sum(-1) / 2, gap.sign_().mul_(pair.q).mul_(0.5)


@tempered
def soft_mse(pair: Pair) -> ValueAndSlope:
    """Squared distance of the distributions, sum (p - q)^2, in [0, 2]."""
    gap = pair.q - pair.p
    return gap.square().sum(-1), gap.mul_(pair.q).mul_(2.0)


def logit_mse(rows: Rows) -> ValueAndSlope:
    """Mean over V of the squared difference of logits (arXiv:2105.08919)."""
    gap = rows.student_nV - rows.teacher_nV
    return gap.square().mean(-1), gap.mul_(2.0 / gap.shape[-1])


def centred_logit_mse(rows: Rows) -> ValueAndSlope:
    """The same after each side's mean over V is taken out, which no softmax sees."""
    gap = rows.student_nV - rows.teacher_nV
    gap.sub_(gap.mean(-1, keepdim=True))
    return gap.square().mean(-1), gap.mul_(2.0 / gap.shape[-1])


def fisher_logit_mse(rows: Rows) -> ValueAndSlope:
    """d^T F d / 2 for d the difference of logits and F = diag(p) - p p^T, the Fisher information of the
    teacher's logits; in nats.

    That is half the variance of d under p, and KL(p || q) to second order. "Logits weighted by gradients" of
    Hsu et al. 2022 (LKD-G, arXiv:2203.10163), who keep the diagonal of F only; whole, it costs no more here
    and does not change when a constant is added to all logits.
    """
    p = rows.at(1.0).p
    gap = rows.student_nV - rows.teacher_nV
    gap.sub_((p * gap).sum(-1, keepdim=True))
    slope = p * gap
    return gap.mul_(slope).sum(-1) / 2, slope


def _forward_kl(pair: Pair) -> ValueAndSlope:
    return (pair.p * (pair.log_p - pair.log_q)).sum(-1), -pair.p


def _reverse_kl(pair: Pair) -> ValueAndSlope:
    gap = pair.log_q - pair.log_p
    return (pair.q * gap).sum(-1), pair.q * gap.add_(1.0)


def _blend(pair: Pair, share_n: Tensor) -> ValueAndSlope:
    """share * KL(p || q) + (1 - share) * KL(q || p) with constant shares."""
    (forward_n, slope), (reverse_n, other) = _forward_kl(pair), _reverse_kl(pair)
    slope.mul_(share_n.unsqueeze(-1)).add_(other.mul_((1.0 - share_n).unsqueeze(-1)))
    return share_n * forward_n + (1.0 - share_n) * reverse_n, slope


def _log_mix(pair: Pair, share: float) -> Tensor:
    """log(share p + (1 - share) q) for 0 < share < 1, also where both vanish."""
    return torch.logaddexp(pair.log_p + math.log(share), pair.log_q + math.log1p(-share))


def _last_of_head(p: Tensor, mass: float) -> Tensor:
    """Probability of the last of the fewest most likely tokens that reach `mass`, [n].

    Looks at few tokens first: sorting a whole vocabulary costs more than the matrix product that made it.
    """
    width = min(64, p.shape[-1])
    while True:
        top = p.topk(width, -1).values
        before = top.cumsum(-1) - top
        if width == p.shape[-1] or bool((before[:, -1] + top[:, -1] >= mass).all()):
            last_n1 = (before < mass).sum(-1, keepdim=True) - 1
            return top.gather(-1, last_n1).squeeze(-1)
        width = min(8 * width, p.shape[-1])
