"""Entries of kind `hidden`: losses between a layer of the student and a cached layer of the teacher."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from student.losses import hidden
from student.losses.catalogue import Loss, Paper


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
        needs="R",
        exactness="exact",
        statement=f"{stored}; {statement}" if statement else stored,
    )


HIDDEN_LOSSES: tuple[Loss, ...] = (
    _entry("mse", hidden.mse, "‖h_S − h_T‖² / D", Paper("FitNets: Hints for Thin Deep Nets", "1412.6550")),
    _entry(
        "nmse",
        hidden.nmse,
        "‖h_S − h_T‖² / ‖h_T‖²",
        None,
        "layers of different size weigh the same",
    ),
    _entry(
        "l1", hidden.l1, "‖h_S − h_T‖₁ / D", Paper("DistilHuBERT", "2110.01900"), "without its cosine part"
    ),
    _entry(
        "smooth_l1", hidden.smooth_l1, "Σ huber(h_S − h_T) / D", Paper("EAGLE", "2401.15077"), "knee at 1"
    ),
    _entry(
        "cosine",
        hidden.cosine,
        "1 − cos(h_S, h_T)",
        Paper("DistilBERT, a distilled version of BERT", "1910.01108"),
        "blind to the scale of either side; half of PKD's loss",
    ),
    _entry(
        "logsum",
        hidden.logsum,
        "log Σ |h_S − h_T|⁴",
        Paper("Understanding the Role of the Projector in Knowledge Distillation", "2303.11098"),
        "the logarithm of each position, in the paper of the batch",
    ),
    _entry(
        "mobilebert",
        hidden.layer_norm_mse,
        "‖LN(h_S) − LN(h_T)‖² / D",
        Paper("MobileBERT: feature map transfer", "2004.02984"),
        "layer normalisation without parameters",
    ),
)
