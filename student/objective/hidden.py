"""Entries of kind `hidden`: losses between a layer of the student and a cached layer of the teacher."""

from __future__ import annotations

from student.losses import hidden
from student.objective.catalogue import Loss, Paper

HIDDEN_LOSSES: tuple[Loss, ...] = (
    Loss(
        name="hidden_mse",
        kind="hidden",
        function=hidden.mse,
        formula="‖h_S − h_T‖² / D",
        paper=Paper("FitNets: Hints for Thin Deep Nets", "1412.6550"),
        needs="R",
        exactness="exact",
        statement="up to the rounding of the stored hidden states",
    ),
    Loss(
        name="hidden_cosine",
        kind="hidden",
        function=hidden.cosine,
        formula="1 − cos(h_S, h_T)",
        paper=Paper("DistilBERT, a distilled version of BERT", "1910.01108"),
        needs="R",
        exactness="exact",
        statement="up to the rounding of the stored hidden states; blind to the scale of either side",
    ),
)
