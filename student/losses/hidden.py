"""Losses between hidden states of teacher and student, per position and in float32, and their entries in the
catalogue.

Shape letters: N positions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from student.losses.catalogue import Loss, Need, Paper

ALPHA = 4  # exponent of `logsum`; 4 to 5 did best in its paper
FLOOR = 1e-8  # of the sum in `logsum`: differences of 0.01, about what bfloat16 keeps of a state of size one


def widened(states: Tensor) -> Tensor:
    """Float32, or float64 where the states are."""
    return states if states.dtype == torch.float64 else states.float()


def mse(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """Mean over D of the squared difference, [N]."""
    return (widened(student_ND) - widened(teacher_ND)).square().mean(-1)


def nmse(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """Squared difference relative to the teacher's square, |s - t|^2 / |t|^2, [N].

    Layers of different size then weigh the same, and so do positions whose states are huge.
    """
    s_ND, t_ND = widened(student_ND), widened(teacher_ND)
    return (s_ND - t_ND).square().sum(-1) / t_ND.square().sum(-1).clamp_min(FLOOR)


def l1(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """Mean over D of the absolute difference, [N] (DistilHuBERT, arXiv:2110.01900)."""
    return (widened(student_ND) - widened(teacher_ND)).abs().mean(-1)


def smooth_l1(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """Mean over D of Huber's loss with its knee at 1, [N] (EAGLE, arXiv:2401.15077)."""
    return F.smooth_l1_loss(widened(student_ND), widened(teacher_ND), reduction="none").mean(-1)


def cosine(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """1 - cosine similarity, [N], in [0, 2]; blind to the scale of either side (DistilBERT, Sanh et al.
    2019). Twice this is the loss between normalised states of PKD (arXiv:1908.09355).
    """
    return 1.0 - F.cosine_similarity(widened(student_ND), widened(teacher_ND), dim=-1)


def logsum(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """log of the sum over D of |s - t|^4, [N] (arXiv:2303.11098, there over a whole batch).

    The logarithm keeps a large gap between the models from drowning the other terms. Unbounded below in
    theory, here by log 1e-8.
    """
    return ((widened(student_ND) - widened(teacher_ND)).pow(ALPHA).sum(-1) + FLOOR).log()


def layer_norm_mse(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """Mean over D of the squared difference after layer normalisation without parameters, [N]: the feature
    map transfer of MobileBERT (arXiv:2004.02984). Blind to the mean and scale of either side.
    """
    s_ND, t_ND = (F.layer_norm(widened(x), x.shape[-1:]) for x in (student_ND, teacher_ND))
    return (s_ND - t_ND).square().mean(-1)


def _entry(
    name: str, function: Callable[..., Tensor], formula: str, paper: Paper | None, statement: str = ""
) -> Loss:
    stored = "up to the rounding of the stored hidden states"
    return Loss(
        name=f"hidden_{name}",
        kind="hidden",
        function=function,
        formula=formula,
        paper=paper,
        needs=Need.HIDDEN,
        exactness="exact",
        statement=f"{stored}; {statement}" if statement else stored,
    )


HIDDEN_LOSSES: tuple[Loss, ...] = (
    _entry("mse", mse, "‖h_S − h_T‖² / D", Paper("FitNets: Hints for Thin Deep Nets", "1412.6550")),
    _entry(
        "nmse",
        nmse,
        "‖h_S − h_T‖² / ‖h_T‖²",
        None,
        "layers of different size weigh the same",
    ),
    _entry("l1", l1, "‖h_S − h_T‖₁ / D", Paper("DistilHuBERT", "2110.01900"), "without its cosine part"),
    _entry("smooth_l1", smooth_l1, "Σ huber(h_S − h_T) / D", Paper("EAGLE", "2401.15077"), "knee at 1"),
    _entry(
        "cosine",
        cosine,
        "1 − cos(h_S, h_T)",
        Paper("DistilBERT, a distilled version of BERT", "1910.01108"),
        "blind to the scale of either side; half of PKD's loss",
    ),
    _entry(
        "logsum",
        logsum,
        "log Σ |h_S − h_T|⁴",
        Paper("Understanding the Role of the Projector in Knowledge Distillation", "2303.11098"),
        "the logarithm of each position, in the paper of the batch",
    ),
    _entry(
        "mobilebert",
        layer_norm_mse,
        "‖LN(h_S) − LN(h_T)‖² / D",
        Paper("MobileBERT: feature map transfer", "2004.02984"),
        "layer normalisation without parameters",
    ),
)
