"""The held-out split, labels, and padded batches against the features as they lie in the store."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from featurestore.order import epoch_order
from featurestore.reader import CacheReader
from featurestore.schema import NO_DRAW, HiddenSpec, LogitsFeatures
from student.data import IGNORE, CachedDataset, CacheOrder, Collator, learned_labels, pad_heads
from student.errors import UserError
from student.objective import depth_map, parse_layer_map
from student.split import is_held_out, split_samples
from tests.student.conftest import SPECS


def ids(count: int) -> list[str]:
    rng = np.random.default_rng(0)
    return [rng.bytes(16).hex() for _ in range(count)]


def test_the_split_has_the_asked_share_and_is_a_partition() -> None:
    training, held_out = split_samples(ids(4000), 0.1)
    assert sorted(training + held_out) == list(range(4000))
    assert abs(len(held_out) - 400) < 4 * (4000 * 0.1 * 0.9) ** 0.5  # four standard deviations


def test_extending_the_cache_or_the_fraction_moves_no_sample_back() -> None:
    names = ids(500)
    few = {name for name in names[:100] if is_held_out(name, 0.2)}
    assert {name for name in names if is_held_out(name, 0.2)} & set(names[:100]) == few
    assert {name for name in names if is_held_out(name, 0.1)} <= {n for n in names if is_held_out(n, 0.2)}


@pytest.mark.parametrize(("fraction", "side"), [(0.001, "held-out"), (0.999, "training")])
def test_an_empty_side_is_refused(fraction: float, side: str) -> None:
    with pytest.raises(UserError, match=f"--eval-fraction .* no {side} sample"):
        split_samples(ids(3), fraction)


def test_a_position_is_learned_when_the_next_token_exists_and_is() -> None:
    labels = learned_labels(np.array([5, 6, 7, 8], np.int32), np.array([True, False, True, True]))
    assert labels.tolist() == [IGNORE, 7, 8, IGNORE]
    assert learned_labels(np.array([5], np.int32), np.array([True])).tolist() == [IGNORE]


def test_a_batch_holds_what_the_store_holds(cache: Path) -> None:
    reader = CacheReader.open(cache)
    logits, bf16, f32 = SPECS
    dataset = pickle.loads(pickle.dumps(CachedDataset(reader, [3, 0, 7], SPECS)))
    samples = [dataset[index] for index in range(len(dataset))]
    batch = Collator(SPECS, 199, pad_token=2)(samples)
    longest = max(len(sample.tokens) for sample in samples)
    assert batch["input_ids"].shape == batch["labels"].shape == (3, longest)
    assert batch["hidden_targets"][1].dtype == torch.bfloat16
    for row, sample in enumerate(samples):
        length = len(sample.tokens)
        feature = sample.features[logits]
        assert isinstance(feature, LogitsFeatures)
        assert batch["input_ids"][row, :length].tolist() == sample.tokens.tolist()
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (longest - length)
        assert (batch["labels"][row, length - 1 :] == IGNORE).all()
        log_p = feature.logits.reshape(length, 16).astype(np.float64) - feature.lse[:, None]
        np.testing.assert_array_equal(
            batch["head_ids"][row, :length].numpy(), feature.ids.reshape(length, 16)
        )
        np.testing.assert_allclose(batch["head_logprobs"][row, :length], log_p, atol=1e-6)
        rest = 1 - np.exp(log_p).sum(-1)
        np.testing.assert_allclose(batch["tail_logprob"][row, :length].exp(), rest, atol=1e-6)
        for spec in (bf16, f32):
            assert isinstance(spec, HiddenSpec)
            got = batch["hidden_targets"][spec.layer][row]
            np.testing.assert_array_equal(got[:length].float().numpy(), sample.features[spec].to_float32())
            assert not got[length:].any()


def test_training_reads_in_the_caches_order(cache: Path) -> None:
    reader = CacheReader.open(cache)
    indices = list(range(1, len(reader), 2))
    order = CacheOrder(CachedDataset(reader, indices, SPECS), seed=3)
    assert len(reader.shards()) > 2
    assert sorted(i for s in reader.shards() for i in s) == list(range(len(reader)))
    epochs = []
    for epoch in (0, 1, 0):
        order.set_epoch(epoch)
        epochs.append(list(order))
    assert epochs[0] == epochs[2] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(len(indices))) and len(order) == len(indices)
    own = [[(i - 1) // 2 for i in shard if i % 2] for shard in reader.shards()]
    wanted = epoch_order(reader.manifest_digest, 3, 1, [shard for shard in own if shard])
    assert epochs[1] == wanted.tolist()


def test_ragged_heads_repeat_the_first_id_on_padding() -> None:
    feature = LogitsFeatures(
        counts=np.array([1, 3], np.uint16),
        ids=np.array([9, 4, 5, 6], np.uint32),
        logits=np.array([2.0, 1.0, 0.5, 0.0], np.float32),
        lse=np.array([2.5, 3.0], np.float32),
        label_logprob=np.array([-1.0, np.nan], np.float32),
        entropy=np.zeros(2, np.float32),
    )
    padded = pad_heads([feature], 3, vocab_size=10)
    assert padded["head_ids"][0, :2].tolist() == [[9, 9, 9], [4, 5, 6]]
    assert padded["head_logprobs"][0, 0].tolist() == [-0.5, -np.inf, -np.inf]
    np.testing.assert_array_equal(padded["label_logprob"][0], [-1.0, np.nan, 0.0])


def test_a_head_of_the_whole_vocabulary_has_no_tail() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.1999], np.float32))
    feature = LogitsFeatures(
        counts=np.array([3], np.uint16),
        ids=np.arange(3, dtype=np.uint32),
        logits=logits,
        lse=np.zeros(1, np.float32),
        label_logprob=np.zeros(1, np.float32),
        entropy=np.zeros(1, np.float32),
    )
    padded = pad_heads([feature], 1, vocab_size=3)
    assert padded["tail_logprob"].item() == -np.inf
    assert padded["head_logprobs"].exp().sum().item() == pytest.approx(1, abs=1e-6)


def test_draws_become_columns_that_share_the_tail() -> None:
    feature = LogitsFeatures(
        counts=np.array([1, 2], np.uint16),
        ids=np.array([9, 4, 5], np.uint32),
        logits=np.log(np.array([0.5, 0.6, 0.2], np.float32)),
        lse=np.zeros(2, np.float32),
        label_logprob=np.zeros(2, np.float32),
        entropy=np.array([1.5, 0.7], np.float32),
        tail_ids=np.array([[1, 3, 3, 8], [NO_DRAW] * 4], np.int32),
    )
    padded = pad_heads([feature], 3, vocab_size=10)
    assert padded["head_ids"][0, :2].tolist() == [[9, 9, 1, 3, 9, 8], [4, 5, 4, 4, 4, 4]]
    columns = padded["head_logprobs"][0].exp()
    np.testing.assert_allclose(columns[0], [0.5, 0, 0.125, 0.25, 0, 0.125], atol=1e-6)
    np.testing.assert_allclose(columns[1], [0.6, 0.2, 0, 0, 0, 0], atol=1e-6)
    assert padded["tail_logprob"][0, 0] == -np.inf, "nothing is left outside of a sampled row"
    assert padded["tail_logprob"][0, 1].exp().item() == pytest.approx(0.2, abs=1e-6)
    np.testing.assert_array_equal(padded["teacher_entropy"][0], np.array([1.5, np.nan, np.nan], np.float32))


def test_relative_depth_and_explicit_layer_maps() -> None:
    assert depth_map([0, 10, 20, 30], 30, 6) == [(0, 0), (10, 2), (20, 4), (30, 6)]
    assert depth_map([15], 30, 5) == [(15, 3)]  # 2.5 rounds up
    assert parse_layer_map("10:4,20:8") == [(10, 4), (20, 8)]
    with pytest.raises(UserError, match="--layer-map"):
        parse_layer_map("10-4")
