"""Entries of kind `head`: losses on the sparse distribution, computed inside the fused LM head."""

from __future__ import annotations

from student.losses.sparse import cross_entropy, forward_kl
from student.objective.catalogue import Loss, Paper

HEAD_LOSSES: tuple[Loss, ...] = (
    Loss(
        name="kl",
        kind="head",
        function=forward_kl,
        formula="Σ p log(p / q)",
        paper=Paper("Distilling the Knowledge in a Neural Network", "1503.02531"),
        needs="H",
        better="T",
        exactness="unbiased",
        statement="value and gradient with draws; without, a lower bound (one bucket for the rest)",
    ),
    Loss(
        name="ce",
        kind="head",
        function=cross_entropy,
        formula="−log q(label)",
        paper=None,
        needs="",
        exactness="exact",
        statement="uses the labels only",
    ),
)
