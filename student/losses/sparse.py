"""Losses on the sparse teacher distribution, as functions of the student's *reduced* logits.

A cache row holds the exact head of the teacher's distribution (K columns) and, through the stored logsumexp,
the mass of everything else. Whatever a loss does with such a row, the student enters it through K + 2 numbers
only: its logits at the head columns, the logsumexp of all its other logits, and its logit at the label.
`student.losses.fused` computes these from a chunk of hidden states and spreads the gradient with respect to
them over the vocabulary, so that a new loss is one plain differentiable function here.

Shape letters: N positions, K head columns (padded), V vocabulary.
"""

# ruff: noqa: N815  (shape suffixes on dataclass fields)
from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class SparseTargets:
    """The teacher's side of N positions.

    ids_NK: int64 head columns, best first; padding repeats column 0 (so that gathers and scatters stay in
    range). logprob_NK: float teacher log-probabilities; -inf marks padding. tail_N: float log of the
    teacher's mass outside the head; -inf where there is none. label_N: int64 next token.

    Rows whose tail was sampled have their draws as further columns, of probability repeats * tail mass / M,
    so that the columns sum to one and nothing is left outside; entropy_N (float, nats) is the teacher's full
    entropy there and NaN in the other rows. None: no row is sampled.
    """

    ids_NK: Tensor
    logprob_NK: Tensor
    tail_N: Tensor
    label_N: Tensor
    entropy_N: Tensor | None = None

    def slice(self, start: int, stop: int) -> SparseTargets:
        """The same targets for positions start..stop."""
        parts: dict[str, Tensor | None] = {field.name: getattr(self, field.name) for field in fields(self)}
        sliced = {name: part[start:stop] for name, part in parts.items() if part is not None}
        return SparseTargets(**sliced)


@dataclass(frozen=True)
class ReducedLogits:
    """The student's side of N positions.

    head_NK: logits at the head columns; -inf marks padding.
    tail_N: logsumexp of the logits outside the head; -inf where the head is the whole vocabulary.
    label_N: logit of the next token.
    """

    head_NK: Tensor
    tail_N: Tensor
    label_N: Tensor

    def lse(self) -> Tensor:
        """Logsumexp over the whole vocabulary, [N]."""
        return torch.logsumexp(torch.cat([self.head_NK, self.tail_N.unsqueeze(-1)], dim=-1), dim=-1)


def forward_kl(student: ReducedLogits, teacher: SparseTargets) -> Tensor:
    """KL(teacher || student) in nats per position, [N], of the distributions coarse-grained to head + one
    tail bucket.

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
    gap_NK = teacher.logprob_NK - (student.head_NK - lse_N.unsqueeze(-1))
    head_N = torch.where(real_NK, teacher.logprob_NK.exp() * gap_NK.masked_fill(~real_NK, 0.0), 0.0).sum(-1)
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
