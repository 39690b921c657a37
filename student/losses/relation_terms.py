"""Entries of kind `relation`: losses between a block of the student and one of the teacher, whose queries,
keys and values are recomputed from the cached hidden states that go into it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from featurestore.format.sidecar import BlockSpec
from student.errors import UserError
from student.losses.blocks import BlockPair
from student.losses.catalogue import Loss, Need, Option, Paper
from student.losses.hidden import mse
from student.losses.relations import Vectors, attention_output, relation_kl

_HEADS = Option(
    None,
    "relation heads to split both sides into; without it, the most of whole attention heads on both sides",
    low=1,
    high=1024,
    integer=True,
)
_MINILM = Paper("MiniLM: Deep Self-Attention Distillation", "2002.10957")
_MINILM2 = Paper("MiniLMv2: Multi-Head Self-Attention Relation Distillation", "2012.15828")
_STATEMENT = "up to the rounding of the stored hidden states; a position sees what stands before it"


def query_relation(pair: BlockPair, relation_heads: int | None = None) -> Tensor:
    """Of queries among themselves, [B, T]."""
    return _relation(pair.student.query, pair.teacher.query, relation_heads)


def key_relation(pair: BlockPair, relation_heads: int | None = None) -> Tensor:
    """Of keys, each key head once however many query heads share it."""
    return _relation(pair.student.key, pair.teacher.key, relation_heads)


def value_relation(pair: BlockPair, relation_heads: int | None = None) -> Tensor:
    """Of values, each value head once however many query heads share it."""
    return _relation(pair.student.value, pair.teacher.value, relation_heads)


def qkv_relation(pair: BlockPair, relation_heads: int | None = None) -> Tensor:
    """Sum of the three."""
    kinds = (query_relation, key_relation, value_relation)
    return sum((kind(pair, relation_heads) for kind in kinds[1:]), kinds[0](pair, relation_heads))


def _relation(student_BTHd: Tensor, teacher_BTHd: Tensor, heads: int | None) -> Tensor:
    heads = heads or math.gcd(student_BTHd.shape[2], teacher_BTHd.shape[2])
    student, teacher = (Vectors.among_themselves(side, heads) for side in (student_BTHd, teacher_BTHd))
    return relation_kl(student, teacher)


def attention_map(pair: BlockPair) -> Tensor:
    """Of queries with keys as both models attend, over what both windows let a position see, [B, T]."""
    student, teacher = pair.attention()
    return relation_kl(student, teacher, pair.window)


def attention_context(pair: BlockPair) -> Tensor:
    """Mean squared difference of the heads' outputs, before the output projection, [B, T]."""
    sides = zip(pair.rotated(), (pair.student, pair.teacher), pair.scorings, strict=True)
    outputs = [
        attention_output(q, k, parts.value, scoring.scale, pair.window) for (q, k), parts, scoring in sides
    ]
    return mse(*outputs)


def check_sizes(loss: Loss, options: Mapping[str, Any], student: Any, teacher: BlockSpec, where: str) -> None:
    """UserError when blocks of these heads cannot be compared; student: its text configuration."""
    count = student.num_attention_heads
    groups = getattr(student, "num_key_value_heads", None) or count
    head_dim = getattr(student, "head_dim", None) or student.hidden_size // count
    if "relation_heads" not in loss.options:
        softcaps = (teacher.attention_softcap, getattr(student, "attn_logit_softcapping", None))
        if loss.name == "attention_output" and any(softcaps):
            raise UserError(f"{where}: not for soft-capped attention; use attention_map or qkv_relation")
        sizes = [(count, head_dim), (teacher.heads, teacher.head_dim)]
        if sizes[0] != sizes[1] if loss.name == "attention_output" else count != teacher.heads:
            raise UserError(
                f"{where}: the student's attention has {count} heads of {head_dim}, the teacher's "
                f"{teacher.heads} of {teacher.head_dim}; use qkv_relation, which compares any heads"
            )
        return
    heads = options.get("relation_heads")
    if heads is None:
        return
    widths = {
        "query_relation": (count * head_dim, teacher.heads * teacher.head_dim),
        "key_relation": (groups * head_dim, teacher.kv_heads * teacher.head_dim),
    }
    widths["value_relation"] = widths["key_relation"]
    names = widths if loss.name == "qkv_relation" else [loss.name]
    uneven = [width for name in names for width in widths[name] if width % heads]
    if uneven:
        raise UserError(
            f"{where}: relation_heads {heads} does not divide a width of {uneven[0]}; "
            f"{math.gcd(*(width for name in names for width in widths[name]))} and its divisors do"
        )


def _entry(name: str, function: object, formula: str, paper: Paper, split: bool) -> Loss:
    return Loss(
        name=name,
        kind="relation",
        function=function,  # type: ignore[arg-type]
        formula=formula,
        paper=paper,
        needs=Need.PROJECTIONS,
        exactness="exact",
        statement=_STATEMENT,
        options={"relation_heads": _HEADS} if split else {},
    )


RELATION_LOSSES: tuple[Loss, ...] = (
    _entry(
        "attention_map", attention_map, "mean over heads of KL(A_T‖A_S), A = softmax(QKᵀ/√d)", _MINILM, False
    ),
    _entry(
        "attention_output",
        attention_context,
        "‖O_S − O_T‖² / D, O = A V of all heads",
        Paper("Understanding and Improving KD for Quantization-Aware Training", "2211.11014"),
        False,
    ),
    _entry(
        "query_relation",
        query_relation,
        "mean over heads of KL(R_T‖R_S), R = softmax(QQᵀ/√d)",
        _MINILM2,
        True,
    ),
    _entry("key_relation", key_relation, "the same of K", _MINILM2, True),
    _entry("value_relation", value_relation, "the same of V", _MINILM, True),
    _entry(
        "qkv_relation",
        qkv_relation,
        "query_relation + key_relation + value_relation",
        Paper("BitNet Distillation", "2510.13998"),
        True,
    ),
)
