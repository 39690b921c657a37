"""Losses between two full distributions over the vocabulary, each with its gradient written out.

A loss takes one chunk of rows, adds its gradient with respect to the student's logits to that of the chunk,
and returns its values: `student.losses.full_pass` needs no autograd graph over n x V. It goes over the
vocabulary in blocks of columns, so that what lies between logits and gradient stays in the processor's cache
and never exists as a whole; logsumexp is combined from those of the blocks, as in the online softmax of
Milakov and Gimelshein (arXiv:1805.02867).

A divergence sees one block of both distributions at one temperature T and returns its part of the value and
the slope s with respect to log q, as if these were free; through the softmax that is
d value / d z = (s - q * sum s) / T. `tempered` does this, and multiplies by T^2, so that gradients keep their
size (Hinton et al. 2015, arXiv:1503.02531).

p is the teacher, q the student, z their logits. Shape letters: n positions of a chunk, V vocabulary,
W columns of a block.
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
# Numbers of a block: what a loss makes of it fits the caches of a CPU; a GPU wants fewer launches.
BLOCK_ELEMENTS = {"cpu": 2**18, "cuda": 2**22}


@dataclass(frozen=True)
class Pair:
    """Log-probabilities [n, W] of teacher (p) and student (q)."""

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
    """A chunk's logits on both sides, float32 or float64 [n, V], to be read only.

    gradient_nV: what losses add theirs to; None where nobody wants it.
    """

    student_nV: Tensor
    teacher_nV: Tensor
    gradient_nV: Tensor | None = None
    _lse: dict[float, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @cached_property
    def blocks(self) -> list[slice]:
        """Columns to go over one after the other."""
        (n, v), kind = self.student_nV.shape, self.student_nV.device.type
        step = max(1, BLOCK_ELEMENTS.get(kind, BLOCK_ELEMENTS["cuda"]) // max(n, 1))
        return [slice(start, min(start + step, v)) for start in range(0, v, step)]

    def pair(self, block: slice, temperature: float) -> Pair:
        """Both distributions at a temperature, in a block of columns."""
        p_n1, q_n1 = self.lse(temperature)
        return Pair(
            (self.teacher_nV[:, block] / temperature).sub_(p_n1),
            (self.student_nV[:, block] / temperature).sub_(q_n1),
        )

    def lse(self, temperature: float) -> tuple[Tensor, Tensor]:
        """Logsumexp of logits / T of teacher and student, [n, 1]; computed once."""
        if temperature not in self._lse:
            teacher_n1, student_n1 = (
                torch.stack(
                    [(z_nV[:, block] / temperature).logsumexp(-1) for block in self.blocks], -1
                ).logsumexp(-1, keepdim=True)
                for z_nV in (self.teacher_nV, self.student_nV)
            )
            self._lse[temperature] = teacher_n1, student_n1
        return self._lse[temperature]

    def add(self, block: slice, gradient: Tensor, weight: float) -> None:
        """Add weight * gradient in a block of columns."""
        if self.gradient_nV is not None:
            self.gradient_nV[:, block].add_(gradient, alpha=weight)

    def new_values(self) -> Tensor:
        """Zeros [n]."""
        return self.student_nV.new_zeros(len(self.student_nV))


DenseLoss = Callable[[Rows, float], Tensor]  # (rows, weight) -> values [n]; adds weight * gradient


def tempered(divergence: Callable[..., ValueAndSlope]) -> Callable[..., Tensor]:
    """Make (pair, **options) -> (value, slope in log q) of a block into a loss
    (rows, weight, temperature=1.0, **options) -> T^2 value.
    """

    @wraps(divergence)
    def loss(rows: Rows, weight: float, temperature: float = 1.0, **options: float) -> Tensor:
        return _over_blocks(rows, weight, temperature, partial(divergence, **options))

    return loss


def _over_blocks(
    rows: Rows, weight: float, temperature: float, divergence: Callable[[Pair], ValueAndSlope]
) -> Tensor:
    """T^2 times the sum of a divergence over the vocabulary; its gradient goes to the rows'."""
    value_n, sum_n = rows.new_values(), rows.new_values()
    wanted, scale = weight != 0 and rows.gradient_nV is not None, weight * temperature
    # 1. Values, slopes and their sums, block by block.
    for block in rows.blocks:
        part_n, slope = divergence(rows.pair(block, temperature))
        value_n += part_n
        if wanted:
            sum_n += slope.sum(-1)
            rows.add(block, slope, scale)
    # 2. The slope of the softmax's normaliser, which needs the whole sum.
    if wanted:
        for block in rows.blocks:
            rows.add(block, rows.pair(block, temperature).q.mul_(sum_n.unsqueeze(-1)), -scale)
    return temperature**2 * value_n


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


def adaptive_kl(rows: Rows, weight: float, temperature: float = 1.0, mu: float = 0.5) -> Tensor:
    """(g_h KL(p || q) + g_t KL(q || p)) / (g_h + g_t), g the sum of |p - q| over the teacher's head or tail.

    The head is the fewest most likely tokens that reach `mu` (and those as likely as the last of
    them); the weights g are constants to the gradient (AKL, arXiv:2404.02657).
    """
    last_n1 = _last_of_head(rows, temperature, mu).unsqueeze(-1)
    whole_n, head_n = rows.new_values(), rows.new_values()
    for block in rows.blocks:
        pair = rows.pair(block, temperature)
        gap = (pair.p - pair.q).abs_()
        whole_n += gap.sum(-1)
        head_n += gap.mul_(pair.p >= last_n1).sum(-1)
    share_n = torch.where(whole_n > 0, head_n / whole_n, 0.5)
    return _over_blocks(rows, weight, temperature, partial(_blend, share_n=share_n))


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


def logit_mse(rows: Rows, weight: float) -> Tensor:
    """Mean over V of the squared difference of logits (arXiv:2105.08919)."""
    return _square_gap(rows, weight, rows.new_values())


def centred_logit_mse(rows: Rows, weight: float) -> Tensor:
    """The same after each side's mean over V is taken out, which no softmax sees."""
    sum_n = rows.new_values()
    for block in rows.blocks:
        sum_n += _gap(rows, block).sum(-1)
    return _square_gap(rows, weight, sum_n / rows.student_nV.shape[-1])


def fisher_logit_mse(rows: Rows, weight: float) -> Tensor:
    """d^T F d / 2 for d the difference of logits and F = diag(p) - p p^T, the Fisher information of the
    teacher's logits; in nats.

    That is half the variance of d under p, and KL(p || q) to second order. "Logits weighted by gradients" of
    Hsu et al. 2022 (LKD-G, arXiv:2203.10163), who keep the diagonal of F only; whole, it costs no more here
    and does not change when a constant is added to all logits.
    """
    mean_n, value_n = rows.new_values(), rows.new_values()
    for block in rows.blocks:
        mean_n += rows.pair(block, 1.0).p.mul_(_gap(rows, block)).sum(-1)
    for block in rows.blocks:
        gap = _gap(rows, block).sub_(mean_n.unsqueeze(-1))
        slope = rows.pair(block, 1.0).p.mul_(gap)
        rows.add(block, slope, weight)
        value_n += gap.mul_(slope).sum(-1)
    return value_n / 2


def _gap(rows: Rows, block: slice) -> Tensor:
    return rows.student_nV[:, block] - rows.teacher_nV[:, block]


def _square_gap(rows: Rows, weight: float, mean_n: Tensor) -> Tensor:
    """Mean over V of (difference of logits - mean)^2, where the mean is the difference's own or zero."""
    value_n, v = rows.new_values(), rows.student_nV.shape[-1]
    for block in rows.blocks:
        gap = _gap(rows, block).sub_(mean_n.unsqueeze(-1))
        rows.add(block, gap, 2.0 * weight / v)
        value_n += gap.square_().sum(-1)
    return value_n / v


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


def _last_of_head(rows: Rows, temperature: float, mass: float) -> Tensor:
    """Probability of the last of the fewest most likely tokens that reach `mass`, [n].

    Looks at few tokens first: sorting a whole vocabulary costs more than the matrix product that made it.
    """
    lse_n1, v = rows.lse(temperature)[0], rows.teacher_nV.shape[-1]
    width = min(64, v)
    while True:
        top = rows.teacher_nV.topk(width, -1).values.div_(temperature).sub_(lse_n1).exp_()
        before = top.cumsum(-1) - top
        if width == v or bool((before[:, -1] + top[:, -1] >= mass).all()):
            last_n1 = (before < mass).sum(-1, keepdim=True) - 1
            return top.gather(-1, last_n1).squeeze(-1)
        width = min(8 * width, v)
