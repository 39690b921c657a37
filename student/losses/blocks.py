"""Queries, keys and values of one decoder block, from the hidden states that go into it: the student's by its
own modules, the teacher's by the projections in the cache's sidecar.

Both are computed beside the model's own pass, from the block's input; hooks on the projections would lose
gradients under gradient checkpointing.

Shape letters: B batch, T positions, D hidden size, H query heads, G key and value heads, d head size.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from student.errors import UserError
from student.losses.relations import Scoring, Vectors

Rotation = tuple[Tensor, Tensor]  # cosines and sines, each [1 or B, T, rotated part of d]


@dataclass(frozen=True)
class Projected:
    """Before rotation and after the norms of heads: query [B, T, H, d], key and value [B, T, G, d]."""

    query: Tensor
    key: Tensor
    value: Tensor


class StudentBlock:
    """A decoder block of the student, as transformers builds Llama and its kin; ValueError for another."""

    def __init__(self, layer: nn.Module) -> None:
        attention = getattr(layer, "self_attn", None)
        norm = getattr(layer, "input_layernorm", None)
        if attention is None or norm is None or not hasattr(attention, "head_dim"):
            raise ValueError("it has no input_layernorm and self_attn")
        self._norm, self._attention = norm, attention
        if not hasattr(attention, "qkv_proj") and not all(
            hasattr(attention, f"{name}_proj") for name in "qkv"
        ):
            raise ValueError("it has no q_proj, k_proj and v_proj, nor a qkv_proj")
        self._rotate = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)

    @property
    def scoring(self) -> Scoring:
        """Of its attention."""
        softcap = getattr(self._attention, "attn_logit_softcapping", None)
        return Scoring(float(self._attention.scaling), None if softcap is None else float(softcap))

    @property
    def window(self) -> int | None:
        """How many positions its attention looks back, itself included; None: all."""
        window = getattr(self._attention, "sliding_window", None)
        return None if window is None else int(window)

    def project(self, hidden_BTD: Tensor) -> Projected:
        """From the block's input, differentiable."""
        attention, x_BTD = self._attention, self._norm(hidden_BTD)
        d = attention.head_dim
        if hasattr(attention, "qkv_proj"):
            wide = attention.config.num_attention_heads * d
            narrow = attention.config.num_key_value_heads * d
            flat = attention.qkv_proj(x_BTD).split([wide, narrow, narrow], -1)
        else:
            flat = [attention.q_proj(x_BTD), attention.k_proj(x_BTD), attention.v_proj(x_BTD)]
        q, k, v = (part.reshape(*part.shape[:-1], -1, d) for part in flat)
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k)
        return Projected(q, k, v)

    def rotate(self, parts: Projected, rotation: Rotation | None) -> tuple[Tensor, Tensor]:
        """Queries and keys as its attention compares them; ValueError where it rotates in its own way."""
        if rotation is None or not getattr(self._attention, "use_rope", True):
            return parts.query, parts.key
        if self._rotate is None:
            raise ValueError("its rotary embedding is not transformers' usual one")
        query, key = self._rotate(parts.query, parts.key, *rotation, unsqueeze_dim=2)
        return query, key


def check_student_blocks(config: Any, where: str) -> None:
    """UserError when a student of this configuration has blocks that `StudentBlock` does not know; cheap, on
    no device.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        layers = AutoModelForCausalLM.from_config(config).get_decoder().layers
    try:
        StudentBlock(layers[0])
    except ValueError as error:
        raise UserError(
            f"{where}: queries, keys and values of a {config.model_type} student cannot be recomputed "
            f"({error}); leave the loss out"
        ) from None


class TeacherBlock(nn.Module):
    """A decoder block of the teacher, as far as the sidecar has it: frozen, and in no state dict.

    spec: a `featurestore.format.sidecar.BlockSpec`. weights: by name there, float32, or bfloat16 and float16
    for matrices. max_position: of the teacher.
    """

    def __init__(self, spec: Any, weights: Mapping[str, Tensor], max_position: int) -> None:
        super().__init__()
        self.spec, self._names = spec, {name: name.replace(".", "_") for name in weights}
        for name, weight in weights.items():
            self.register_buffer(self._names[name], weight, persistent=False)
        self._rotary = None if spec.rope is None else rotary(spec, max_position)

    @property
    def scoring(self) -> Scoring:
        """Of its attention."""
        return Scoring(self.spec.attention_scale, self.spec.attention_softcap)

    @property
    def window(self) -> int | None:
        """How many positions its attention looks back, itself included; None: all."""
        window: int | None = self.spec.window
        return window

    @torch.no_grad()
    def project(self, hidden_BTD: Tensor) -> Projected:
        """From the block's input; the norm in float32, products in float32 or as autocast says."""
        x_BTD = rms_norm(hidden_BTD.float(), self._weight("input_norm.weight"), self.spec.norm_eps)
        parts = []
        for name in ("q", "k", "v"):
            weight, bias = self._weight(f"{name}.weight"), self._weight(f"{name}.bias")
            flat = nn.functional.linear(x_BTD, weight.float(), None if bias is None else bias.float())
            heads = flat.view(*flat.shape[:-1], -1, self.spec.head_dim)
            norm = self._weight(f"{name}_norm.weight")
            parts.append(heads if norm is None else rms_norm(heads.float(), norm, self.spec.norm_eps))
        return Projected(*parts)

    @torch.no_grad()
    def rotate(self, parts: Projected) -> tuple[Tensor, Tensor]:
        """Queries and keys as its attention compares them, for positions 0 to T - 1."""
        if self._rotary is None:
            return parts.query, parts.key
        positions = torch.arange(parts.query.shape[1], device=parts.query.device).unsqueeze(0)
        cos, sin = self._rotary(parts.query.float(), positions)
        return turn(parts.query, cos, sin), turn(parts.key, cos, sin)

    def _weight(self, name: str) -> Any:
        return getattr(self, self._names[name]) if name in self._names else None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean x^2 + eps) * weight over the last dimension."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()


def turn(x_BTHd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding by halves (RoFormer, arXiv:2104.09864) of the first numbers of each head."""
    size = cos.shape[-1]
    first, second = x_BTHd[..., : size // 2], x_BTHd[..., size // 2 : size]
    across = torch.cat([-second, first], -1)
    turned = x_BTHd[..., :size] * cos.unsqueeze(2) + across * sin.unsqueeze(2)
    return torch.cat([turned, x_BTHd[..., size:]], -1)


def rotary(spec: Any, max_position: int) -> nn.Module:
    """transformers' rotary embedding of any type, for one head size; UserError for an unknown type."""
    from transformers import LlamaConfig
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding  # heeds partial_rotary_factor

    config = LlamaConfig(
        hidden_size=spec.hidden_size,
        num_attention_heads=spec.heads,
        head_dim=spec.head_dim,
        max_position_embeddings=max_position,
        rope_parameters=dict(spec.rope),
    )
    try:
        module: nn.Module = Phi3RotaryEmbedding(config)
    except (KeyError, TypeError, ValueError) as error:
        kind = spec.rope.get("rope_type")
        raise UserError(
            f"the cache's teacher has a rotary embedding that this transformers does not know ({kind}: "
            f"{error}); leave attention_map and attention_output out"
        ) from error
    return module


class BlockPair:
    """A student's and a teacher's block on one batch; projected and rotated once, whatever compares them.

    student_BTD, teacher_BTD: what goes into the blocks. rotation: the student's.
    """

    def __init__(
        self,
        blocks: tuple[StudentBlock, TeacherBlock],
        student_BTD: Tensor,
        teacher_BTD: Tensor,
        rotation: Rotation | None,
    ) -> None:
        self._blocks, self._rotation = blocks, rotation
        self._inputs = student_BTD, teacher_BTD

    @cached_property
    def student(self) -> Projected:
        """Differentiable."""
        return self._blocks[0].project(self._inputs[0])

    @cached_property
    def teacher(self) -> Projected:
        """Without a gradient."""
        return self._blocks[1].project(self._inputs[1])

    @property
    def scorings(self) -> tuple[Scoring, Scoring]:
        """Of the attention of both models."""
        return self._blocks[0].scoring, self._blocks[1].scoring

    @property
    def window(self) -> int | None:
        """How far both sides look back; None: to the beginning."""
        return min((block.window for block in self._blocks if block.window is not None), default=None)

    def rotated(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(query, key) of the student and of the teacher."""
        student, teacher = self._blocks
        return student.rotate(self.student, self._rotation), teacher.rotate(self.teacher)

    def attention(self) -> tuple[Vectors, Vectors]:
        """The attention of both models, with a copy of a key head for each query head that shares it."""
        sides = []
        for (query, key), scoring in zip(self.rotated(), self.scorings, strict=True):
            repeated = key.repeat_interleave(query.shape[2] // key.shape[2], 2)
            sides.append(Vectors(query.transpose(1, 2), repeated.transpose(1, 2), scoring))
        return sides[0], sides[1]
