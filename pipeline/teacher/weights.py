"""What of the teacher's checkpoint goes into the cache: chosen weights, found by name, read without a model.

What the weights mean is known per model type, because a checkpoint does not say it: a norm that multiplies by
1 + weight has the same tensors as one that multiplies by weight. So other types are refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from distily.checkpoint.weights import read_tensors, weight_files
from distily.errors import CheckpointError
from featurestore.format.sidecar import DTYPES, HEAD, BlockSpec, HeadSpec, PartSpec, Tensor
from pipeline.errors import RequestError
from pipeline.teacher.checkpoint import Teacher, read_config

# Decoders with RMSNorm whose projections and logits are as `featurestore.format.sidecar` writes them down.
_PLAIN = (
    "granite",
    "llama",
    "mistral",
    "mixtral",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "smollm3",
)
# The same, but norms multiply by 1 + weight.
_ONE_PLUS = ("gemma", "gemma2", "gemma3_text")
MODEL_TYPES = tuple(sorted((*_PLAIN, *_ONE_PLUS)))
_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True, kw_only=True)
class TensorSource:
    """Rows of one tensor of the checkpoint. one_plus: 1 is added, in float32, where the model does so too."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    one_plus: bool

    @property
    def size(self) -> int:
        """Bytes in the sidecar."""
        return math.prod(self.shape) * (4 if self.one_plus else _ITEM_BYTES[self.dtype])

    def read(self) -> Tensor:
        """The rows, and nothing else of the file."""
        import torch
        from safetensors import safe_open

        with safe_open(self.file, framework="pt") as tensors:
            rows: torch.Tensor = tensors.get_slice(self.name)[self.start : self.start + self.shape[0]]
        if self.one_plus:
            return Tensor("f32", (1.0 + rows.float()).numpy())
        bits = rows.contiguous().view(torch.uint16) if rows.dtype == torch.bfloat16 else rows.contiguous()
        return Tensor(DTYPES[self.dtype][0], bits.numpy())


@dataclass(frozen=True)
class PlannedPart:
    """A part of the sidecar, known from config and headers alone."""

    spec: PartSpec
    sources: Mapping[str, TensorSource]

    @property
    def size(self) -> int:
        """Bytes of its weights."""
        return sum(source.size for source in self.sources.values())

    def read(self) -> dict[str, Tensor]:
        """Its weights by name."""
        return {name: source.read() for name, source in self.sources.items()}


def plan_sidecar(
    teacher: Teacher, final: bool, layers: Sequence[int], trust_remote_code: bool = False
) -> list[PlannedPart]:
    """Find the weights of the LM head, when `final`, and of decoder blocks `layers`; reads headers only.

    Raises:
        RequestError: the model type is not one that we know, or the checkpoint lacks what its type has, or
            has it quantised.
    """
    if not final and not layers:
        return []
    flag = "--final" if final else "--relation-layers"
    config = read_config(teacher.path, teacher.name, trust_remote_code)
    kind = config.get_text_config().model_type
    own_code = trust_remote_code and bool(getattr(config, "auto_map", None))
    if kind not in MODEL_TYPES or own_code:
        what = f"{kind} with code of its own" if own_code else kind
        raise RequestError(
            f"{flag}: what the weights of {what} mean is not known, only those of {', '.join(MODEL_TYPES)}; "
            "leave the flag out, and name layers with --hidden-layers"
        )
    checkpoint = _Checkpoint(teacher, config.get_text_config())
    head = [checkpoint.head(bool(config.tie_word_embeddings))] if final else []
    return head + [checkpoint.block(layer) for layer in sorted(layers)]


class _Checkpoint:
    """The tensors of a checkpoint by name, from the headers of its files."""

    def __init__(self, teacher: Teacher, text: Any) -> None:
        self._teacher, self._text = teacher, text
        self._one_plus = text.model_type in _ONE_PLUS

    def head(self, tied: bool) -> PlannedPart:
        text, vocab = self._text, self._teacher.vocab_size
        weight = self._named("lm_head.weight")
        embeddings = f"{self._prefix}embed_tokens.weight"
        # Tied weights are stored under either name.
        if tied and (embeddings in self._files or weight not in self._files):
            weight = embeddings
        spec = HeadSpec(
            vocab_size=vocab,
            hidden_size=self._teacher.hidden_size,
            norm_eps=text.rms_norm_eps,
            # Only Granite has the field.
            logit_scale=1.0 / getattr(text, "logits_scaling", 1.0),
            logit_softcap=getattr(text, "final_logit_softcapping", None),
        )
        bias = weight.removesuffix("weight") + "bias"
        sources = {
            "weight": (weight, False),
            "norm.weight": (f"{self._prefix}norm.weight", True),
            **({"bias": (bias, False)} if bias in self._files else {}),
        }
        return self._part(spec, sources, "--final")

    def block(self, layer: int) -> PlannedPart:
        flag, spec = "--relation-layers", self._block_spec(layer)
        inside = f"{self._prefix}layers.{layer}."
        attention = f"{inside}self_attn."
        sources = {"input_norm.weight": (f"{inside}input_layernorm.weight", True)}
        for name in ("q_norm", "k_norm"):
            if f"{attention}{name}.weight" in self._files:
                sources[f"{name}.weight"] = (f"{attention}{name}.weight", True)
        fused = f"{attention}qkv_proj.weight"
        if fused in self._files:
            return self._part(spec, sources, flag, fused)
        for name in ("q", "k", "v"):
            sources[f"{name}.weight"] = (f"{attention}{name}_proj.weight", False)
            if f"{attention}{name}_proj.bias" in self._files:
                sources[f"{name}.bias"] = (f"{attention}{name}_proj.bias", False)
        return self._part(spec, sources, flag)

    def _block_spec(self, layer: int) -> BlockSpec:
        text = self._text
        heads = text.num_attention_heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        kinds = getattr(text, "layer_types", None)
        kind = kinds[layer] if kinds else None
        windowed = kind in (None, "sliding_attention")
        rope = dict(text.rope_parameters)
        # Gemma 3 rotates its local layers otherwise than its global ones; SmolLM3 leaves some unrotated.
        rope = rope.get(kind, rope)
        rotated = (getattr(text, "no_rope_layers", None) or {layer: 1})[layer]
        scalar = getattr(text, "query_pre_attn_scalar", None) or head_dim
        return BlockSpec(
            layer=layer,
            hidden_size=text.hidden_size,
            heads=heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=head_dim,
            norm_eps=text.rms_norm_eps,
            attention_scale=getattr(text, "attention_multiplier", None) or scalar**-0.5,
            attention_softcap=getattr(text, "attn_logit_softcapping", None),
            window=getattr(text, "sliding_window", None) if windowed else None,
            rope=rope if rotated else None,
        )

    def _part(
        self, spec: PartSpec, names: Mapping[str, tuple[str, bool]], flag: str, fused: str = ""
    ) -> PlannedPart:
        """names: ours -> (the checkpoint's, is it a norm). fused: one tensor with the rows of Q, K and V."""
        shapes = spec.required() | spec.optional()
        sources = {
            ours: self._source(
                name,
                shapes[ours],
                flag,
                one_plus=norm and self._one_plus,
                padded=spec.part == HEAD and not norm,
            )
            for ours, (name, norm) in names.items()
        }
        if fused:
            parts = ("q.weight", "k.weight", "v.weight")
            start, rows = 0, sum(shapes[ours][0] for ours in parts)
            for ours in parts:
                sources[ours] = self._source(fused, shapes[ours], flag, start, rows)
                start += shapes[ours][0]
        return PlannedPart(spec, sources)

    def _source(
        self,
        name: str,
        shape: tuple[int, ...],
        flag: str,
        start: int = 0,
        rows: int | None = None,
        one_plus: bool = False,
        padded: bool = False,
    ) -> TensorSource:
        """rows: of the whole tensor, where `shape` is not all of it. padded: it may have more, left out."""
        from safetensors import safe_open

        file = self._files.get(name)
        if file is None:
            raise RequestError(f"{flag}: the checkpoint {self._teacher.name} has no tensor {name}")
        with safe_open(file, framework="pt") as tensors:
            found = tensors.get_slice(name)
            dtype, there = found.get_dtype(), tuple(found.get_shape())
        if dtype not in _ITEM_BYTES:
            raise RequestError(
                f"{flag}: {name} of {self._teacher.name} is quantised to {dtype}; take the same teacher "
                "unquantised, or leave the flag out"
            )
        expected = (rows or shape[0], *shape[1:])
        if there != expected and not (padded and there[:1] > shape[:1] and there[1:] == shape[1:]):
            raise RequestError(
                f"{flag}: {name} of {self._teacher.name} has the shape {there}, its config says {expected}"
            )
        return TensorSource(file=file, name=name, dtype=dtype, shape=shape, start=start, one_plus=one_plus)

    def _named(self, ending: str) -> str:
        """The one tensor whose name ends so; the ending itself when there is none."""
        found = [name for name in self._files if name == ending or name.endswith(f".{ending}")]
        return found[0] if len(found) == 1 else ending

    @cached_property
    def _prefix(self) -> str:
        """What stands before the decoder's own names: "model.", or more in a model that also sees."""
        for ending in ("embed_tokens.weight", "layers.0.input_layernorm.weight"):
            if (name := self._named(ending)) in self._files:
                return name.removesuffix(ending)
        return ""

    @cached_property
    def _files(self) -> dict[str, Path]:
        """Tensor -> file, of the files that transformers would load."""
        try:
            tensors = read_tensors(weight_files(self._teacher.path))
        except CheckpointError as error:
            raise RequestError(f"TEACHER {self._teacher.name}: {error}") from None
        return {name: tensor.file for name, tensor in tensors.items()}
