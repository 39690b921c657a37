"""The sparse teacher distribution, the student's *reduced* logits, and the losses that use both as they are.

A cache row holds the exact head of the teacher's distribution (K columns) and, through the stored logsumexp,
the mass of everything else. Whatever a loss does with such a row, the student enters it through a few numbers
only: its logits at the head columns, the logsumexp of all its other logits, its logit at the label, and on
request that logsumexp at other temperatures and its own largest logits (`Reduction`).
`student.losses.sparse_pass` computes these from a chunk of hidden states and spreads the gradient with
respect to them over the vocabulary, so that a new loss is one plain differentiable function, here or in
`divergences`, `ranking`, `transport`.

Shape letters: N positions, K head columns (padded), M columns of draws, V vocabulary.
"""

# ruff: noqa: N815  (shape suffixes on dataclass fields)
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

TOKEN_SCALE_TEMPERATURE = 10.0
CERTAIN = 1e-4  # minus the log-probability of what is as good as certain


@dataclass(frozen=True)
class Tempered:
    """Head and tail at another temperature than 1: log p_T, float [N, K + M], and log of the mass outside the
    head, float [N]; both as in SparseTargets, draws excepted: they say nothing at other temperatures, so
    that their columns are -inf and the tail is all that is not head.
    """

    logprob_NK: Tensor
    tail_N: Tensor


@dataclass(frozen=True, kw_only=True)
class SparseTargets:
    """The teacher's side of N positions.

    ids_NK: int64 head columns, best first; padding repeats column 0 (so that gathers and scatters stay in
    range). logprob_NK: float teacher log-probabilities; -inf marks padding. tail_N: float log of the
    teacher's mass outside the head; -inf where there is none. label_N: int64 next token.

    Rows whose tail was sampled have their draws as further columns, of probability repeats * tail mass / M,
    so that the columns sum to one and nothing is left outside; entropy_N (float, nats) is the teacher's full
    entropy there (of several teachers, mixed, their mean) and NaN in the other rows. None: no row is sampled.
    draws: how many of the last columns may hold draws.

    Where an objective needs them: label_logprob_N, float, the teacher's log-probability of the next token;
    token_scale_N, float, see `token_scale`; tempered, by temperature.

    Of a teacher with another tokenizer (`student.data.token_map`): known_N, bool, False where it has no
    distribution and the row is the label alone; ranked_NK, float, log-probabilities of its head in descending
    order, whatever tokens of the student they are of; spans_N2, float, see `along_spans`.
    """

    ids_NK: Tensor
    logprob_NK: Tensor
    tail_N: Tensor
    label_N: Tensor
    entropy_N: Tensor | None = None
    draws: int = 0
    label_logprob_N: Tensor | None = None
    token_scale_N: Tensor | None = None
    tempered: Mapping[float, Tempered] = field(default_factory=dict)
    known_N: Tensor | None = None
    ranked_NK: Tensor | None = None
    spans_N2: Tensor | None = None

    @property
    def head_columns(self) -> int:
        """Columns that are not draws."""
        return self.ids_NK.shape[1] - self.draws

    def slice(self, start: int, stop: int) -> SparseTargets:
        """The same targets for positions start..stop."""
        names = (
            *("ids_NK", "logprob_NK", "tail_N", "label_N", "entropy_N", "label_logprob_N", "token_scale_N"),
            *("known_N", "ranked_NK", "spans_N2"),
        )
        parts = {name: getattr(self, name) for name in names}
        sliced = {name: part[start:stop] for name, part in parts.items() if part is not None}
        tempered = {
            temperature: Tempered(at_temperature.logprob_NK[start:stop], at_temperature.tail_N[start:stop])
            for temperature, at_temperature in self.tempered.items()
        }
        return replace(self, **sliced, tempered=tempered)


@dataclass(frozen=True)
class Reduction:
    """What losses want of the student beside its logits at the head and the label, and its tail.

    tails: other temperatures of the tail. ranked: as many of its largest logits as the head has columns, but
    one at least.
    """

    tails: tuple[float, ...] = ()
    ranked: bool = False


@dataclass(frozen=True, kw_only=True)
class ReducedLogits:
    """The student's side of N positions.

    head_NK: logits at the head columns; -inf marks padding.
    tail_N: logsumexp of the logits outside the head; -inf where the head is the whole vocabulary.
    label_N: logit of the next token.
    tails: temperature T -> logsumexp of logits / T outside the head, [N]; those of Reduction.tails.
    top_NK: the largest logits of the row, descending; with Reduction.ranked.
    """

    head_NK: Tensor
    tail_N: Tensor
    label_N: Tensor
    tails: Mapping[float, Tensor] = field(default_factory=dict)
    top_NK: Tensor | None = None

    def tail_at(self, temperature: float) -> Tensor:
        """Logsumexp of logits / temperature outside the head, [N]."""
        return self.tail_N if temperature == 1.0 else self.tails[temperature]

    def lse(self) -> Tensor:
        """Logsumexp over the whole vocabulary, [N]."""
        return torch.logsumexp(torch.cat([self.head_NK, self.tail_N.unsqueeze(-1)], dim=-1), dim=-1)


def forward_kl(student: ReducedLogits, teacher: SparseTargets) -> Tensor:
    """KL(teacher || student) in nats per position, [N], of the distributions coarse-grained to head + one
    tail bucket (Hinton et al., arXiv:1503.02531; other temperatures: `divergences.tempered_kl`).

    Everything outside the head is ONE outcome, of teacher mass 1 - sum p and student mass 1 - sum q. By the
    data processing inequality this is a lower bound of the KL over the full vocabulary; it is zero exactly
    when the student equals the teacher on the head (the tail's mass then agrees, its inner shape is not
    seen). The gradient with respect to the head logits is q - p, unlike plain top-k KL, whose gradient (sum
    p) q - p is biased.

    Rows with a sampled tail give the KL over the full vocabulary instead, -H(p) - sum p^ log q, where p^ is
    the head and the weighted draws and H the stored entropy: value and gradient q - p^ are unbiased estimates
    (importance sampling as in Sparse Logit Sampling, ACL 2025, with an exact head). A single row may then
    come out below zero.
    """
    lse_N = student.lse()
    real_NK = torch.isfinite(teacher.logprob_NK)
    # Head: the sum of p (log p - log q). In padding, p = 0 and log p = -inf; its product is set to 0.
    gap_NK = teacher.logprob_NK - (student.head_NK - lse_N.unsqueeze(-1))
    head_N = torch.where(real_NK, teacher.logprob_NK.exp() * gap_NK.masked_fill(~real_NK, 0.0), 0.0).sum(-1)
    # Tail: the same product for the two masses outside the head. Rows without a tail add nothing.
    has_tail_N = torch.isfinite(teacher.tail_N)
    gap_N = (teacher.tail_N - (student.tail_N - lse_N)).masked_fill(~has_tail_N, 0.0)
    kl_N = head_N + teacher.tail_N.exp() * gap_N
    if teacher.entropy_N is None:
        return kl_N
    # Only the constant differs: the sum of p^ log p^ is no estimate of the sum of p log p.
    logprob_NK = teacher.logprob_NK.masked_fill(~real_NK, 0.0)
    sampled_N = (teacher.logprob_NK.exp() * logprob_NK).sum(-1)
    return kl_N - torch.where(torch.isnan(teacher.entropy_N), 0.0, teacher.entropy_N + sampled_N)


def cross_entropy(student: ReducedLogits, teacher: SparseTargets) -> Tensor:
    """-log q(label) in nats per position, [N]; uses the labels only, not the teacher."""
    return student.lse() - student.label_N


def span_likelihood(student: ReducedLogits, teacher: SparseTargets) -> Tensor:
    """KL of two outcomes, the text of a span or any other, [N]: `outcome_kl` of its likelihoods.

    Between models with one tokenizer a span is the label. Needs label_logprob_N; 0 where that is not known.
    Across tokenizers, spans are what both cut alike (GOLD, of TRL): see `along_spans`.
    """
    assert teacher.label_logprob_N is not None
    return outcome_kl(student.label_N - student.lse(), teacher.label_logprob_N)


def outcome_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """p log(p / q) + (1 - p) log((1 - p) / (1 - q)) in nats; 0 where p is NaN.

    By the data processing inequality at most the KL of the distributions over all texts. Probabilities are
    at most exp(-CERTAIN), so that both logarithms are finite.
    """
    known = ~torch.isnan(log_p)
    log_p = log_p.masked_fill(~known, -1.0).clamp(max=-CERTAIN).to(log_q.dtype)
    log_q = log_q.clamp(max=-CERTAIN)
    this = log_p.exp() * (log_p - log_q)
    other = -torch.expm1(log_p) * (_log_other(log_p) - _log_other(log_q))
    return torch.where(known, this + other, 0.0)


def _log_other(log_p: Tensor) -> Tensor:
    """log(1 - p)."""
    return torch.log(-torch.expm1(log_p))


def along_spans(student: ReducedLogits, teacher: SparseTargets) -> Tensor:
    """A loss on the cross-entropies of several positions together, [N], by spans_N2 of the targets: what it
    is at each position, and its derivative with respect to the cross-entropy there.
    """
    assert teacher.spans_N2 is not None
    value_N, slope_N = teacher.spans_N2.to(student.tail_N.dtype).unbind(-1)
    part_N = slope_N * cross_entropy(student, teacher)
    return part_N + (value_N - part_N).detach()


def where_known(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The loss where the teacher has a distribution, and the cross-entropy with the label elsewhere."""

    def either(student: ReducedLogits, teacher: SparseTargets) -> Tensor:
        assert teacher.known_N is not None
        return torch.where(teacher.known_N, loss(student, teacher), cross_entropy(student, teacher))

    return either


def token_scaled_kl(student: ReducedLogits, teacher: SparseTargets) -> Tensor:
    """Forward KL times `token_scale`, [N]: token-scaled logit distillation (TSLD, arXiv:2308.06744).

    The paper has the cross-entropy with the soft labels in the place of the KL, which differs by the
    teacher's entropy only. Exact in the sense that `forward_kl` is.
    """
    assert teacher.token_scale_N is not None
    return teacher.token_scale_N.to(student.tail_N.dtype) * forward_kl(student, teacher)


def token_scale(label_logprob_N: Tensor, sequence_N: Tensor) -> Tensor:
    """softmax of -log p(label) / 10 over the positions of each sequence, times their number, [N].

    Tokens that the teacher finds hard weigh more; the mean over a sequence is 1, so that a loss keeps its
    size, where the paper's sum over a sequence does not depend on the length.
    """
    rows = int(sequence_N.max()) + 1 if len(sequence_N) else 0
    score_N = -label_logprob_N / TOKEN_SCALE_TEMPERATURE
    peak = score_N.new_full((rows,), -torch.inf).scatter_reduce_(0, sequence_N, score_N, "amax")
    exp_N = (score_N - peak[sequence_N]).exp()
    sums = exp_N.new_zeros(rows).index_add_(0, sequence_N, exp_N)
    counts = exp_N.new_zeros(rows).index_add_(0, sequence_N, torch.ones_like(exp_N))
    return exp_N * (counts / sums)[sequence_N]


def soft_mse(student: ReducedLogits, teacher: SparseTargets) -> Tensor:
    """sum over the vocabulary of (p - q)^2, [N]: the multi-class Brier score against soft labels.

    Outside the head this is sum p^2 - 2 sum p q + sum q^2. The last sum is exact: it is exp(lse' - 2 lse),
    lse' the logsumexp of 2 z there, the student's tail at temperature 1/2. In rows with draws the sum in the
    middle is estimated by them, linear in p and therefore without bias, and the first, a constant, is left
    out: value but for that constant, and gradient, are unbiased. In other rows only the head is summed, a
    lower bound.
    """
    lse_N1 = student.lse().unsqueeze(-1)
    real_NK = torch.isfinite(teacher.logprob_NK)
    q_NK = (student.head_NK - lse_N1).exp()
    p_NK = teacher.logprob_NK.exp()
    squares_NK = (p_NK - q_NK).square()
    # Of a draw, only what is not its own p^2, which is part of the constant.
    squares_NK = torch.where(_is_draw(teacher), squares_NK - p_NK.square(), squares_NK)
    head_N = torch.where(real_NK, squares_NK, 0.0).sum(-1)
    if teacher.entropy_N is None:
        return head_N
    rest_N = (student.tail_at(0.5) - lse_N1.squeeze(-1) * 2.0).exp()
    return head_N + torch.where(torch.isnan(teacher.entropy_N), 0.0, rest_N)


def _is_draw(teacher: SparseTargets) -> Tensor:
    """bool [K + M]: which columns hold draws."""
    columns = teacher.ids_NK.shape[1]
    return torch.arange(columns, device=teacher.ids_NK.device) >= teacher.head_columns


def one_for_all(student: ReducedLogits, teacher: SparseTargets, gamma: float) -> Tensor:
    """Cross-entropy with the part of the label raised: -(1 + p_y)^gamma log q_y - sum of p log q over
    all other tokens, [N] (One-for-All, arXiv:2310.19444). Needs label_logprob_N.

    Given logits of an intermediate state, projected to the width of an LM head, it is that paper's loss of an
    exit branch: `sparse_head_loss` takes the state and any head. What is outside the stored columns is one
    bucket, as in `forward_kl`; with draws the sum is an unbiased estimate. Where the teacher's probability of
    the label is not known, the label has weight 1 beside the plain cross-entropy.
    """
    assert teacher.label_logprob_N is not None
    lse_N = student.lse()
    real_NK = torch.isfinite(teacher.logprob_NK)
    surprise_NK = (lse_N.unsqueeze(-1) - student.head_NK).masked_fill(~real_NK, 0.0)
    soft_N = (teacher.logprob_NK.exp() * surprise_NK).sum(-1)
    surprise_N = (lse_N - student.tail_N).masked_fill(~torch.isfinite(teacher.tail_N), 0.0)
    label_N = teacher.label_logprob_N.nan_to_num(nan=-torch.inf).exp()
    weight_N = (1.0 + label_N) ** gamma - label_N
    return soft_N + teacher.tail_N.exp() * surprise_N + weight_N * (lse_N - student.label_N)
