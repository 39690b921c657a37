"""Which samples an engine takes together, and which teachers of transformers may take several at once."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

# Layers in which a position sees earlier ones through an attention mask only, and layers without attention.
_MASKED_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "sparse", "dense"}
# Rotary embeddings whose frequencies do not depend on the longest sequence of a batch.
_FIXED_ROPE = {"default", "linear", "llama3", "yarn", "proportional"}


def pieces(prompts: Sequence[np.ndarray], limit: int) -> Iterator[list[np.ndarray]]:
    """Neighbouring prompts of `limit` positions together at most, or one prompt alone, in the order given."""
    piece: list[np.ndarray] = []
    size = 0
    for tokens in prompts:
        if piece and size + len(tokens) > limit:
            yield piece
            piece, size = [], 0
        piece.append(tokens)
        size += len(tokens)
    if piece:
        yield piece


def batches(lengths: Sequence[int], limit: int, more: int = 0) -> Iterator[list[int]]:
    """Places of prompts of like length, whose padded positions stay within `limit`, or of one alone.

    Each prompt takes `more` positions beside its own.
    """
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: lengths[place]):
        # Sorted, so this one is the longest.
        if batch and (len(batch) + 1) * (lengths[place] + more) > limit:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def padding_is_exact(model: Any) -> bool:
    """Whether samples padded on the right give, up to rounding, what each gives alone.

    In a causal transformer no real position sees the padding behind it. That is relied on where all of this
    holds, because elsewhere what else is in a batch may reach a sample's numbers:

    - The class is transformers' own, not code of the checkpoint, and its attention is the shared one, which
      heeds an `attention_mask`. Others choose a kernel or cut sequences in blocks by the batch's width.
    - There is no recurrent, convolutional or top-k sparse layer. States and blocks run through the padding.
    - Rotary embeddings are fixed: `dynamic` and `longrope` rescale all samples by the longest of the batch.
    - No expert has a capacity, for which the tokens of a batch compete.
    - Weights are not quantised, or in NF4: LLM.int8() looks for outliers in a batch as a whole, and other
      formats may scale activations by it.
    """
    config = model.config.get_text_config()
    return (
        type(model).__module__.startswith("transformers.")
        and "attention_mask" in inspect.signature(type(model).forward).parameters
        and bool(getattr(model, "_supports_attention_backend", False))
        and not getattr(model, "_is_stateful", False)
        and set(getattr(config, "layer_types", None) or ()) <= _MASKED_LAYERS
        and _rope_types(getattr(config, "rope_parameters", None)) <= _FIXED_ROPE
        and not any("capacity" in name for name in config.to_dict())
        and (not getattr(model, "is_quantized", False) or bool(getattr(model, "is_loaded_in_4bit", False)))
    )


def _rope_types(parameters: Mapping[str, Any] | None) -> set[str]:
    """All kinds of rotary embeddings of a configuration, which has one, or one per layer type."""
    parameters = parameters or {}
    nested = [value for value in parameters.values() if isinstance(value, Mapping)]
    return {str(one.get("rope_type", "default")) for one in (parameters, *nested)}
