"""Losses on how the positions of a sequence lie to each other, or two layers to each other, in float32.

Rows are learned positions, the `lengths` of the sequences that they belong to say which stand together:
nothing is compared across sequences, so a loss depends on neither padding, packing nor batch. Each returns
one value per position, whose mean over a sequence is the paper's loss of it, except where said.

What is T x T in the papers is computed a few rows at a time, and once more in the backward pass, so that it
never exists whole. Only `fsp` needs both sides equally wide.

Shape letters: N positions of all sequences, T positions of one, n rows of a chunk, D hidden size (of either
side).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from student.losses.catalogue import Loss, Need, Paper
from student.losses.hidden import widened

ROW_ELEMENTS = 2**22  # of a T x T matrix held at a time
TRIPLES = 8  # angles at each position
# Two fractions whose multiples fill the unit square evenly (Roberts' R2 sequence).
_STEPS = (0.7548776662466927, 0.5698402909980532)


def similarity(student_ND: Tensor, teacher_ND: Tensor, lengths: Sequence[int]) -> Tensor:
    """Difference of the similarity matrices, [N] (Similarity-Preserving, arXiv:1907.09682).

    G = X X^T over the positions of a sequence, each row scaled to norm one; a position's value is the mean
    over its row of the squared difference between student and teacher.
    """
    return _per_sequence(_similarity, student_ND, teacher_ND, lengths)


def distance(student_ND: Tensor, teacher_ND: Tensor, lengths: Sequence[int]) -> Tensor:
    """Distances between positions, [N] (RKD-D, arXiv:1904.05068).

    Huber's loss between the student's and the teacher's distances, each relative to its mean over all pairs
    of the sequence; a position's value is the mean over its pairs. 0 for a sequence of one position.
    """
    return _per_sequence(_distance, student_ND, teacher_ND, lengths)


def angle(student_ND: Tensor, teacher_ND: Tensor, lengths: Sequence[int]) -> Tensor:
    """Angles at positions, [N] (RKD-A, arXiv:1904.05068).

    Huber's loss between the cosines of the angles that two other positions of the sequence span, seen from
    this one; the mean over TRIPLES pairs, which depend on the sequence's length alone, where the paper takes
    all. 0 for sequences of fewer than three positions.
    """
    with _exact(student_ND):
        states = widened(student_ND), widened(teacher_ND)
        total_N = states[0].sum(-1) * 0.0
        for places_2N in _triples(lengths):
            total_N = total_N + _recomputed(_angle_loss, *places_2N.to(total_N.device), *states)
        return total_N / TRIPLES


def fsp(
    student_NDs: tuple[Tensor, Tensor], teacher_NDs: tuple[Tensor, Tensor], lengths: Sequence[int]
) -> Tensor:
    """Flow between two layers, [N] (FSP, Yim et al., CVPR 2017).

    The FSP matrix is the mean over a sequence's positions of x1 x2^T, of the states x1, x2 of two layers. All
    positions of a sequence have the same value: the mean (there the sum) over its D x D entries of the
    squared difference.
    """
    states = [part for side in (student_NDs, teacher_NDs) for part in side]
    with _exact(states[0]):
        parts = zip(*(_split(x, lengths) for x in states), strict=True)
        values = [_recomputed(_flow, *part).expand(len(part[0])) for part in parts]
        return _joined(values, states[0])


def _flow(s1_TD: Tensor, s2_TD: Tensor, t1_TD: Tensor, t2_TD: Tensor) -> Tensor:
    return ((s1_TD.T @ s2_TD - t1_TD.T @ t2_TD) / len(s1_TD)).square().mean()


def _similarity(student_TD: Tensor, teacher_TD: Tensor) -> Tensor:
    def rows(start: int, stop: int, student_TD: Tensor, teacher_TD: Tensor) -> Tensor:
        s_nT, t_nT = (F.normalize(x[start:stop] @ x.T, dim=-1) for x in (student_TD, teacher_TD))
        return (s_nT - t_nT).square().mean(-1)

    return _by_rows(rows, student_TD, teacher_TD)


def _distance(student_TD: Tensor, teacher_TD: Tensor) -> Tensor:
    length = len(student_TD)
    if length < 2:
        return student_TD.sum(-1) * 0.0

    def totals(start: int, stop: int, student_TD: Tensor, teacher_TD: Tensor) -> Tensor:
        return torch.stack([_distances(x, start, stop).sum(-1) for x in (student_TD, teacher_TD)], dim=-1)

    means_2 = _by_rows(totals, student_TD, teacher_TD).sum(0) / (length * (length - 1))
    scales_2 = 1.0 / means_2.clamp_min(torch.finfo(means_2.dtype).tiny)

    def rows(start: int, stop: int, student_TD: Tensor, teacher_TD: Tensor, scales_2: Tensor) -> Tensor:
        s_nT = _distances(student_TD, start, stop) * scales_2[0]
        t_nT = _distances(teacher_TD, start, stop) * scales_2[1]
        return F.smooth_l1_loss(s_nT, t_nT, reduction="none").sum(-1) / (length - 1)

    return _by_rows(rows, student_TD, teacher_TD, scales_2)


def _distances(states_TD: Tensor, start: int, stop: int) -> Tensor:
    # Through |x|^2 + |y|^2 - 2xy it would be faster and, of neighbours with huge states, mostly rounding.
    return torch.cdist(states_TD[start:stop], states_TD, compute_mode="donot_use_mm_for_euclid_dist")


def _angle_loss(first_N: Tensor, second_N: Tensor, student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    def cosine(x_ND: Tensor) -> Tensor:
        one_ND, other_ND = (F.normalize(x_ND[place_N] - x_ND, dim=-1) for place_N in (first_N, second_N))
        return (one_ND * other_ND).sum(-1)

    return F.smooth_l1_loss(cosine(student_ND), cosine(teacher_ND), reduction="none")


def _triples(lengths: Sequence[int]) -> Tensor:
    """The two others of each position, TRIPLES times: int64 [TRIPLES, 2, N]. Where a sequence is too short a
    position is its own, and spans nothing.
    """
    places, start = [torch.empty(TRIPLES, 2, 0, dtype=torch.int64)], 0
    for length in lengths:
        distances = torch.tensor(_offsets(length) or [(0, 0)] * TRIPLES)
        places.append(start + (torch.arange(length) + distances[:, :, None]) % max(length, 1))
        start += length
    return torch.cat(places, dim=-1)


def _offsets(length: int) -> list[tuple[int, int]]:
    """TRIPLES pairs of different distances to the right, around the end, each in 1..length-1."""
    if length < 3:
        return []
    pairs = []
    for index in range(1, TRIPLES + 1):
        first, second = (1 + int(index * step % 1.0 * (length - 1)) for step in _STEPS)
        pairs.append((first, second if second != first else first % (length - 1) + 1))
    return pairs


def _per_sequence(
    loss: Callable[[Tensor, Tensor], Tensor], student_ND: Tensor, teacher_ND: Tensor, lengths: Sequence[int]
) -> Tensor:
    """loss(student [T, D], teacher [T, D']) -> [T] of each sequence, joined to [N]."""
    with _exact(student_ND):
        parts = zip(*(_split(x, lengths) for x in (student_ND, teacher_ND)), strict=True)
        return _joined([loss(*part) for part in parts], student_ND)


def _by_rows(rows: Callable[..., Tensor], states_TD: Tensor, *more: Tensor) -> Tensor:
    """rows(start, stop, states, *more) for chunks of the rows of `states`, joined."""
    length = len(states_TD)
    size = max(1, ROW_ELEMENTS // length)
    starts = range(0, length, size)
    return torch.cat(
        [_recomputed(rows, start, min(start + size, length), states_TD, *more) for start in starts]
    )


def _split(states_ND: Tensor, lengths: Sequence[int]) -> tuple[Tensor, ...]:
    return torch.split(widened(states_ND), list(lengths))


def _joined(values: list[Tensor], like: Tensor) -> Tensor:
    return torch.cat(values) if values else widened(like).sum(-1)


def _recomputed(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """The function's result; what it held in between is computed again for the gradient."""
    result: Tensor = checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
    return result


def _exact(states: Tensor) -> Any:
    """Autocast would multiply in bfloat16."""
    return torch.autocast(states.device.type, enabled=False)


_RKD = Paper("Relational Knowledge Distillation", "1904.05068")

STRUCTURE_LOSSES: tuple[Loss, ...] = (
    Loss(
        name="hidden_similarity",
        kind="structure",
        function=similarity,
        formula="‖norm(H_S H_Sᵀ) − norm(H_T H_Tᵀ)‖² / T²",
        paper=Paper("Similarity-Preserving Knowledge Distillation", "1907.09682"),
        needs=Need.HIDDEN,
        exactness="exact",
        statement="among the learned positions of a sample, in the paper among the samples of a batch",
        any_width=True,
    ),
    Loss(
        name="hidden_rkd_distance",
        kind="structure",
        function=distance,
        formula="Σ huber(d_S(i, j) / mean − d_T(i, j) / mean) / T(T − 1)",
        paper=_RKD,
        needs=Need.HIDDEN,
        exactness="exact",
        statement="among the learned positions of a sample",
        any_width=True,
    ),
    Loss(
        name="hidden_rkd_angle",
        kind="structure",
        function=angle,
        formula="Σ huber(cos ∠_S(i, j, k) − cos ∠_T(i, j, k)) / 8T",
        paper=_RKD,
        needs=Need.HIDDEN,
        exactness="exact",
        statement="of 8 fixed angles at each learned position, in the paper of all",
        any_width=True,
    ),
    Loss(
        name="hidden_fsp",
        kind="structure",
        function=fsp,
        formula="‖H_Sᵀ H′_S − H_Tᵀ H′_T‖² / T²D²",
        paper=Paper("A Gift from Knowledge Distillation (Yim et al., CVPR 2017)"),
        needs=Need.HIDDEN,
        exactness="exact",
        statement="between each two neighbouring pairs of layers, over the learned positions of a sample",
        flow=True,
    ),
)
