"""The KV cache of a prefill, by hand. That it is enough for vLLM, every test that starts an engine shows."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from pipeline.engines.kv_cache import kv_cache_bytes

SIZES: dict[str, Any] = {
    "max_seq_len": 300,
    "step_positions": 512,
    "sequences": 8,
    "item_bytes": 2,
    "ranks": 1,
}
POSITIONS = 300 + 512 + 8 * 16


def bytes_of(model_type: str, changes: dict[str, Any], **sizes: Any) -> int:
    common = {"hidden_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4}
    return kv_cache_bytes(AutoConfig.for_model(model_type, **common, **changes), **SIZES | sizes)


@pytest.mark.parametrize(
    ("model_type", "changes", "numbers_per_position", "spare"),
    [
        # Keys and values x layers x heads x the size of one.
        ("llama", {"num_key_value_heads": 2}, 2 * 6 * 2 * 24, 1.1),
        ("llama", {"num_key_value_heads": 2, "head_dim": 40}, 2 * 6 * 2 * 40, 1.1),
        ("qwen3", {"num_key_value_heads": 1, "head_dim": 128}, 2 * 6 * 1 * 128, 1.1),
        # No setting for grouped heads: as many as queries have.
        ("gpt_neox", {}, 2 * 6 * 4 * 24, 1.1),
        # Layers of two kinds are filled up to groups of one size.
        ("gemma3_text", {"num_key_value_heads": 2, "head_dim": 32}, 2 * 6 * 2 * 32, 2.0),
    ],
)
def test_bytes(model_type: str, changes: dict[str, Any], numbers_per_position: int, spare: float) -> None:
    assert bytes_of(model_type, changes) == int(POSITIONS * numbers_per_position * 2 * spare)
    assert bytes_of(model_type, changes, item_bytes=4) == int(POSITIONS * numbers_per_position * 4 * spare)


def test_ranks_share_the_heads_and_no_head_is_cut() -> None:
    changes = {"num_key_value_heads": 2}
    one, two, four = (bytes_of("llama", changes, ranks=ranks) for ranks in (1, 2, 4))
    assert two == pytest.approx(one / 2, abs=1) and four == two


def test_longer_samples_and_larger_steps_need_more() -> None:
    changes = {"num_key_value_heads": 2}
    least = bytes_of("llama", changes)
    assert bytes_of("llama", changes, max_seq_len=301) > least
    assert bytes_of("llama", changes, step_positions=513) > least
