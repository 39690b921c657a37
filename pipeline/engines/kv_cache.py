"""How much memory vLLM needs for keys and values when it only prefills."""

from __future__ import annotations

from typing import Any

# Positions in one block of vLLM's cache on a GPU; each sequence of a step leaves part of one empty.
_BLOCK = 16
_SPARE = 1.1
# Layers of several kinds share blocks in groups of equal size, which are filled up with empty ones.
_MIXED = 2.0


def kv_cache_bytes(
    text: Any, *, max_seq_len: int, step_positions: int, sequences: int, item_bytes: int, ranks: int
) -> int:
    """Bytes of the keys and values of one sample of `max_seq_len` positions and of one more step.

    vLLM would take all memory that it may for its cache, of which a prefill uses next to nothing: what a
    sample has left there is of no use once its last position is computed.

    text: configuration of a decoder whose layers all attend. sequences: of one step, at most. item_bytes: of
    a number. ranks: of tensor parallelism, on each of which so much is needed.

    >>> from transformers import LlamaConfig
    >>> sizes = {"max_seq_len": 2048, "step_positions": 4096, "sequences": 256, "item_bytes": 2, "ranks": 1}
    >>> kv_cache_bytes(LlamaConfig(num_hidden_layers=32, num_key_value_heads=8), **sizes) >> 20
    1408
    """
    heads = max(_settings(text, "num_key_value_heads", "num_global_key_value_heads"), default=0)
    heads = heads or text.num_attention_heads
    sizes = _settings(text, "head_dim", "global_head_dim", "v_head_dim")
    size = max([*sizes, -(-text.hidden_size // text.num_attention_heads)])
    positions = max_seq_len + step_positions + sequences * _BLOCK
    kinds = set(getattr(text, "layer_types", None) or ())
    numbers = positions * text.num_hidden_layers * 2 * size * -(-heads // min(ranks, heads))
    return int(numbers * item_bytes * (_MIXED if len(kinds) > 1 else _SPARE))


def _settings(text: Any, *names: str) -> list[int]:
    """The values of those that the configuration has."""
    return [value for name in names if isinstance(value := getattr(text, name, None), int)]
