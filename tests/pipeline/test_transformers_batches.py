"""The transformers engine over several samples at once: what one at a time gives, or one at a time."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from featurestore.format.schema import (
    GroupFeatures,
    GroupSpec,
    HiddenFeatures,
    HiddenSpec,
    LogitsFeatures,
    LogitsSpec,
)
from pipeline.engines.base import EngineConfig
from pipeline.engines.batching import batches, padding_is_exact, pieces
from pipeline.engines.transformers_engine import TransformersEngine
from tests.architectures import VOCAB, make

# The sliding windows of tests/architectures.py hold 32 positions: some are over them, some far below.
LENGTHS = (7, 1, 61, 2, 33, 1, 13, 90, 2, 5, 3, 31)
LIMIT = 96
# A sample of one position, and padding rows that see no position of their window.
BATCHED = ("llama", "mistral", "gemma2", "gemma3_text", "granite", "cohere", "gpt2", "opt", "qwen3_moe")
_SMALL: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2}
_HEADS: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 96}
_ROPE = {"rope_theta": 10_000.0, "factor": 4.0}
# model_type -> a configuration whose samples must not share a batch, each for another reason.
ALONE: dict[str, tuple[str, dict[str, Any]]] = {
    "state space": ("mamba", {"state_size": 8}),
    "convolutions": ("lfm2", {**_HEADS, "layer_types": ["conv", "full_attention"]}),
    "rope by the longest": (
        "llama",
        {**_HEADS, "max_position_embeddings": 32, "rope_parameters": {"rope_type": "dynamic", **_ROPE}},
    ),
    "attention of its own": ("bloom", {"n_head": 2}),
}


def prompts() -> list[np.ndarray]:
    random = np.random.default_rng(3)
    return [random.integers(3, VOCAB, size, dtype=np.int32) for size in LENGTHS]


def engine_of(directory: Path, layers: int, limit: int = LIMIT, dtype: str = "float32") -> TransformersEngine:
    config = AutoConfig.from_pretrained(directory)
    return TransformersEngine(
        EngineConfig(
            model=directory,
            architecture="",
            # The whole distribution.
            groups=(LogitsSpec(VOCAB), HiddenSpec(0, "f32"), HiddenSpec(1, "f32"), HiddenSpec(layers, "f32")),
            dtype=dtype,
            max_seq_len=128,
            vocab_size=VOCAB,
            hidden_size=config.hidden_size,
            num_layers=layers,
            max_num_batched_tokens=limit,
        )
    )


def shapes_of(engine: TransformersEngine) -> list[tuple[int, ...]]:
    """Of the input ids of each forward pass from now on."""
    shapes: list[tuple[int, ...]] = []

    def note(module: object, args: object, kwargs: dict[str, Any]) -> None:
        shapes.append(tuple(kwargs["input_ids"].shape))

    engine._model.register_forward_pre_hook(note, with_kwargs=True)
    return shapes


def difference(ours: dict[GroupSpec, GroupFeatures], theirs: dict[GroupSpec, GroupFeatures]) -> float:
    """The largest of all positions, relative to the size of what is compared."""
    found = []
    for group, a in ours.items():
        b = theirs[group]
        pairs: list[tuple[np.ndarray, np.ndarray]] = []
        if isinstance(a, LogitsFeatures) and isinstance(b, LogitsFeatures):
            np.testing.assert_array_equal(np.isnan(a.label_logprob), np.isnan(b.label_logprob))
            pairs += [(dense(a), dense(b)), (a.lse, b.lse), (a.entropy, b.entropy)]
            pairs.append((np.nan_to_num(a.label_logprob), np.nan_to_num(b.label_logprob)))
        elif isinstance(a, HiddenFeatures) and isinstance(b, HiddenFeatures):
            pairs.append((a.to_float32(), b.to_float32()))
        for x, y in pairs:
            assert x.shape == y.shape
            found.append(float(np.abs(x - y).max() / max(1.0, np.abs(y).max())))
    return max(found)


def dense(features: LogitsFeatures) -> np.ndarray:
    """Logits [T, V]."""
    ids, logits = (part.reshape(-1, VOCAB) for part in (features.ids, features.logits))
    out = np.empty_like(logits)
    np.put_along_axis(out, ids.astype(np.int64), logits, axis=-1)
    return out


@pytest.mark.parametrize("model_type", BATCHED)
def test_a_batch_gives_what_each_sample_gives_alone(model_type: str, tmp_path: Path) -> None:
    engine = engine_of(make(model_type, tmp_path), layers=4)
    shapes = shapes_of(engine)
    samples = prompts()
    together = list(engine.capture(samples))
    passes = list(shapes)
    alone = [next(iter(engine.capture([tokens]))) for tokens in samples]

    assert len(together) == len(samples)
    # The order given: samples of one length are told apart by their numbers.
    assert max(difference(a, b) for a, b in zip(together, alone, strict=True)) < 1e-4
    assert difference(alone[1], alone[5]) > 1e-2
    assert sum(rows for rows, _ in passes) == len(samples)
    assert max(rows for rows, _ in passes) >= 4
    assert all(rows * width <= LIMIT for rows, width in passes)
    assert {rows for rows, _ in shapes[len(passes) :]} == {1}


def test_a_sample_over_the_limit_has_a_pass_of_its_own(tmp_path: Path) -> None:
    engine = engine_of(make("llama", tmp_path), layers=4, limit=16)
    shapes = shapes_of(engine)
    found = list(engine.capture(prompts()))
    assert [len(features[HiddenSpec(0, "f32")].values) for features in found] == list(LENGTHS)  # type: ignore[union-attr]
    assert all(rows * width <= 16 or rows == 1 for rows, width in shapes)
    assert max(rows for rows, _ in shapes) > 1


@pytest.mark.parametrize("reason", ALONE)
def test_where_a_batch_could_change_numbers_samples_go_alone(reason: str, tmp_path: Path) -> None:
    model_type, changes = ALONE[reason]
    config = AutoConfig.for_model(model_type, **_SMALL, **changes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    engine = engine_of(tmp_path, layers=2)
    assert not padding_is_exact(engine._model)
    shapes = shapes_of(engine)
    samples = prompts()
    found = list(engine.capture(samples))
    assert sorted(shapes) == sorted((1, size) for size in LENGTHS)
    # The order given, although short ones are taken first.
    for tokens, features in zip(samples, found, strict=True):
        assert difference(features, next(iter(engine.capture([tokens])))) == 0.0


def test_a_teacher_whose_mask_is_not_heeded_is_found_when_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A class that looks like any other, but lets what is in a batch reach all of it."""
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def mixing(self: Any, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        out = forward(self, *args, attention_mask=attention_mask, **kwargs)
        out.logits = out.logits + 0.3 * out.logits.mean(dim=(0, 1), keepdim=True)
        return out

    directory = make("llama", tmp_path)
    monkeypatch.setattr(LlamaForCausalLM, "forward", mixing)
    engine = engine_of(directory, layers=4)
    assert padding_is_exact(engine._model)
    shapes = shapes_of(engine)
    assert len(list(engine.capture(prompts()))) == len(LENGTHS)
    assert {rows for rows, _ in shapes} == {1}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_of_short_types_is_no_reason_to_go_alone(dtype: str, tmp_path: Path) -> None:
    engine = engine_of(make("llama", tmp_path), layers=4, dtype=dtype)
    shapes = shapes_of(engine)
    assert len(list(engine.capture(prompts()))) == len(LENGTHS)
    assert max(rows for rows, _ in shapes) > 1


@pytest.mark.parametrize("limit", [1, 16, 64])
def test_batches_take_each_place_once_within_the_limit(limit: int) -> None:
    lengths = list(LENGTHS)
    found = list(batches(lengths, limit, more=2))
    assert sorted(place for batch in found for place in batch) == list(range(len(lengths)))
    for batch in found:
        padded = len(batch) * (max(lengths[place] for place in batch) + 2)
        assert padded <= limit or len(batch) == 1


def test_pieces_keep_the_order_within_the_limit() -> None:
    samples = prompts()
    found = list(pieces(samples, 64))
    assert all(tokens is sample for tokens, sample in zip(chain(*found), samples, strict=True))
    assert all(sum(map(len, piece)) <= 64 or len(piece) == 1 for piece in found)
    assert len(found) < len(samples)
