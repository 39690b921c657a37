"""Losses between two full distributions over the vocabulary, each with its gradient written out.

A loss takes a few rows of logits of both sides and returns its values and their gradient with respect to the
student's logits: `student.losses.full_pass` needs no autograd graph over n x V. It gets so few rows at a time
that what lies between logits and gradient stays in the processor's cache and never exists as a whole.

A divergence sees both distributions at one temperature T and returns its value and the slope s with respect
to log q, as if these were free; through the softmax that is d value / d z = (s - q * sum s) / T. `tempered`
does this, and multiplies by T^2, so that gradients keep their size (Hinton et al. 2015, arXiv:1503.02531).

p is the teacher, q the student, z their logits. Shape letters: n rows (positions), V vocabulary.
"""

# ruff: noqa: N815  (shape suffixes on dataclass fields)
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial, wraps

import torch
from torch import Tensor

ValueAndSlope = tuple[Tensor, Tensor]
ValueAndGradient = tuple[Tensor, Tensor]


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
    """Logits of some positions on both sides, float32 or float64 [n, V], to be read only."""

    student_nV: Tensor
    teacher_nV: Tensor
    _pairs: dict[float, Pair] = field(default_factory=dict)

    def pair(self, temperature: float) -> Pair:
        """Both distributions at a temperature; computed once."""
        if temperature not in self._pairs:
            self._pairs[temperature] = Pair(
                *(
                    (z_nV if temperature == 1.0 else z_nV / temperature).log_softmax(-1)
                    for z_nV in (self.teacher_nV, self.student_nV)
                )
            )
        return self._pairs[temperature]


# Values [n] and their gradient [n, V], a tensor of its own.
DenseLoss = Callable[[Rows], ValueAndGradient]


def tempered(divergence: Callable[..., ValueAndSlope]) -> Callable[..., ValueAndGradient]:
    """Make (pair, **options) -> (value, slope in log q) into a loss (rows, temperature=1.0, **options) of
    T^2 value.
    """

    @wraps(divergence)
    def loss(rows: Rows, temperature: float = 1.0, **options: float) -> ValueAndGradient:
        return _through_softmax(rows, temperature, partial(divergence, **options))

    return loss


def _through_softmax(
    rows: Rows, temperature: float, divergence: Callable[[Pair], ValueAndSlope]
) -> ValueAndGradient:
    """T^2 times a divergence, and its gradient with respect to the student's logits."""
    pair = rows.pair(temperature)
    value_n, slope = divergence(pair)
    slope.addcmul_(pair.q, slope.sum(-1, keepdim=True), value=-1.0)
    return temperature**2 * value_n, _times_(slope, temperature)


def forward_kl(rows: Rows, temperature: float = 1.0) -> ValueAndGradient:
    """KL(p || q) in nats; its slope is -p, whose sum is known."""
    pair = rows.pair(temperature)
    value_n = (pair.log_p - pair.log_q).mul_(pair.p).sum(-1)
    return temperature**2 * value_n, _times_(pair.q - pair.p, temperature)


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


def adaptive_kl(rows: Rows, temperature: float = 1.0, mu: float = 0.5) -> ValueAndGradient:
    """(g_h KL(p || q) + g_t KL(q || p)) / (g_h + g_t), g the sum of |p - q| over the teacher's head or tail.

    The head is the fewest most likely tokens that reach `mu` (and those as likely as the last of
    them); the weights g are constants to the gradient (AKL, arXiv:2404.02657).
    """
    pair = rows.pair(temperature)
    gap = (pair.p - pair.q).abs_()
    whole_n = gap.sum(-1)
    head_n = gap.mul_(pair.p >= _last_of_head(pair.p, mu).unsqueeze(-1)).sum(-1)
    share_n = torch.where(whole_n > 0, head_n / whole_n, 0.5)
    return _through_softmax(rows, temperature, partial(_blend, share_n=share_n))


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


def logit_mse(rows: Rows) -> ValueAndGradient:
    """Mean over V of the squared difference of logits (arXiv:2105.08919)."""
    return _mean_square(rows.student_nV - rows.teacher_nV)


def centred_logit_mse(rows: Rows) -> ValueAndGradient:
    """The same after each side's mean over V is taken out, which no softmax sees."""
    gap = rows.student_nV - rows.teacher_nV
    return _mean_square(gap.sub_(gap.mean(-1, keepdim=True)))


def fisher_logit_mse(rows: Rows) -> ValueAndGradient:
    """d^T F d / 2 for d the difference of logits and F = diag(p) - p p^T, the Fisher information of the
    teacher's logits; in nats.

    That is half the variance of d under p, and KL(p || q) to second order. "Logits weighted by gradients" of
    Hsu et al. 2022 (LKD-G, arXiv:2203.10163), who keep the diagonal of F only; whole, it costs no more here
    and does not change when a constant is added to all logits.
    """
    p, gap = rows.pair(1.0).p, rows.student_nV - rows.teacher_nV
    gap.sub_((p * gap).sum(-1, keepdim=True))
    gradient = p * gap
    return gap.mul_(gradient).sum(-1) / 2, gradient


def _mean_square(gap: Tensor) -> ValueAndGradient:
    """Mean over V of gap^2; its mean, where it was taken out, adds nothing to the gradient."""
    v = gap.shape[-1]
    return gap.square().sum(-1) / v, gap.mul_(2.0 / v)


def _times_(gradient: Tensor, factor: float) -> Tensor:
    """In place, and without a pass over the rows where it changes nothing."""
    return gradient if factor == 1.0 else gradient.mul_(factor)


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
    v = p.shape[-1]
    width = min(64, v)
    while True:
        top = p.topk(width, -1).values
        before = top.cumsum(-1) - top
        if width == v or bool((before[:, -1] + top[:, -1] >= mass).all()):
            last_n1 = (before < mass).sum(-1, keepdim=True) - 1
            return top.gather(-1, last_n1).squeeze(-1)
        width = min(8 * width, v)
