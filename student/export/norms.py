"""Where a student's ternary layers normalise their inputs, and whether a format has a place for that."""

from __future__ import annotations

from typing import Literal

from student.export.reference import integer_linears, norm_epsilon
from student.export.source import ExportSource

NormMode = Literal["none", "subln", "per-projection", "other"]
_SUBLN = ("self_attn.o_proj", "mlp.down_proj")


def norm_mode(source: ExportSource) -> NormMode:
    """Which ternary layers have a norm of their own: none, the output projections, all, or others."""
    layers = dict(integer_linears(source.model))
    having = {name for name, layer in layers.items() if layer.rms_norm is not None}
    if not having:
        return "none"
    if having == set(layers):
        return "per-projection"
    if having == {name for name in layers if name.endswith(_SUBLN)}:
        return "subln"
    return "other"


def norm_epsilons(source: ExportSource) -> set[float]:
    """The epsilons of those norms."""
    norms = [layer.rms_norm for _, layer in integer_linears(source.model)]
    return {norm_epsilon(norm) for norm in norms if norm is not None}
