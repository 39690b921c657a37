"""Entries of kind `structure`: how the positions of a sequence, or two layers, lie to each other."""

from __future__ import annotations

from student.losses import structure
from student.losses.catalogue import Loss, Paper

_RKD = Paper("Relational Knowledge Distillation", "1904.05068")

STRUCTURE_LOSSES: tuple[Loss, ...] = (
    Loss(
        name="hidden_similarity",
        kind="structure",
        function=structure.similarity,
        formula="‖norm(H_S H_Sᵀ) − norm(H_T H_Tᵀ)‖² / T²",
        paper=Paper("Similarity-Preserving Knowledge Distillation", "1907.09682"),
        needs="R",
        exactness="exact",
        statement="among the learned positions of a sample, in the paper among the samples of a batch",
        any_width=True,
    ),
    Loss(
        name="hidden_rkd_distance",
        kind="structure",
        function=structure.distance,
        formula="Σ huber(d_S(i, j) / mean − d_T(i, j) / mean) / T(T − 1)",
        paper=_RKD,
        needs="R",
        exactness="exact",
        statement="among the learned positions of a sample",
        any_width=True,
    ),
    Loss(
        name="hidden_rkd_angle",
        kind="structure",
        function=structure.angle,
        formula="Σ huber(cos ∠_S(i, j, k) − cos ∠_T(i, j, k)) / 8T",
        paper=_RKD,
        needs="R",
        exactness="exact",
        statement="of 8 fixed angles at each learned position, in the paper of all",
        any_width=True,
    ),
    Loss(
        name="hidden_fsp",
        kind="structure",
        function=structure.fsp,
        formula="‖H_Sᵀ H′_S − H_Tᵀ H′_T‖² / T²D²",
        paper=Paper("A Gift from Knowledge Distillation (Yim et al., CVPR 2017)"),
        needs="R",
        exactness="exact",
        statement="between each two neighbouring pairs of layers, over the learned positions of a sample",
        flow=True,
    ),
)
