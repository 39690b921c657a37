"""The held-out split, labels, and padded batches against the features as they lie in the store."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from featurestore.format.schema import HiddenFeatures, HiddenSpec, LogitsFeatures
from featurestore.order import EpochOrder
from featurestore.reader import CacheReader
from student.data.batches import IGNORE, CachedDataset, CacheOrder, Collator, next_labels
from student.data.held_out import is_held_out
from student.errors import UserError
from tests.student.conftest import SPECS
from tests.student.splits import split_samples


def ids(count: int) -> list[str]:
    rng = np.random.default_rng(0)
    return [rng.bytes(16).hex() for _ in range(count)]


def test_the_split_has_the_asked_share_and_is_a_partition() -> None:
    split = split_samples(ids(4000), 0.1)
    training, held_out = split.training, split.held_out
    assert sorted([*training, *held_out]) == list(range(4000))
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
    tokens = torch.tensor([[5, 6, 7, 8], [5, 0, 0, 0]])
    learned = torch.tensor([[True, False, True, True], [True, False, False, False]])
    assert next_labels(tokens, learned).tolist() == [[IGNORE, 7, 8, IGNORE], [IGNORE] * 4]


def test_a_batch_holds_what_the_store_holds(cache: Path) -> None:
    reader = CacheReader.open(cache)
    logits, bf16, f32 = SPECS
    dataset = pickle.loads(pickle.dumps(CachedDataset(reader, [3, 0, 7], SPECS)))
    samples = [dataset[index] for index in range(len(dataset))]
    batch = Collator(SPECS, pad_token=2)(samples)
    longest = max(len(sample.tokens) for sample in samples)
    assert batch["input_ids"].shape == batch["labels"].shape == (3, longest)
    assert batch["coded_head"]["ids"].shape == (3, longest, 16)
    assert batch["coded_hidden"][1]["values"].dtype == torch.bfloat16
    for row, index in enumerate([3, 0, 7]):
        sample = reader.read(index, [logits, bf16, f32])
        length = len(sample.tokens)
        feature = sample.features[logits]
        assert isinstance(feature, LogitsFeatures)
        assert batch["input_ids"][row, :length].tolist() == sample.tokens.tolist()
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (longest - length)
        assert (batch["labels"][row, length - 1 :] == IGNORE).all()
        np.testing.assert_array_equal(
            batch["coded_head"]["ids"][row, :length].numpy(), feature.ids.reshape(length, 16)
        )
        for spec in (bf16, f32):
            assert isinstance(spec, HiddenSpec)
            states = sample.features[spec]
            assert isinstance(states, HiddenFeatures)
            got = batch["coded_hidden"][spec.layer]["values"][row]
            np.testing.assert_array_equal(got[:length].float().numpy(), states.to_float32())
            assert not got[length:].any()


def test_training_reads_in_the_caches_order(cache: Path) -> None:
    reader = CacheReader.open(cache)
    indices = list(range(1, len(reader), 2))
    epochs: list[list[int]] = []
    order = CacheOrder(CachedDataset(reader, indices, SPECS), 3, 6, lambda: (0, 1, 0)[len(epochs)])
    assert reader.shards > 2
    for _ in range(3):
        epochs.append(list(order))
    assert epochs[0] == epochs[2] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(len(indices))) and len(order) == len(indices)
    block = -(-len(reader) // reader.shards)
    assert epochs[1] == list(EpochOrder(reader.manifest_digest, 3, 1, len(indices), block))


@pytest.mark.parametrize(("batch", "steps", "whole"), [(7, 3, 2), (6, 3, 3), (18, 1, 1), (50, 1, 0)])
def test_an_epoch_is_whole_steps(cache: Path, batch: int, steps: int, whole: int) -> None:
    """What the last step lacks is filled up with samples that teach nothing, or the step is left out."""
    dataset = CachedDataset(CacheReader.open(cache), range(18), SPECS)
    filled = CacheOrder(dataset, 3, batch, lambda: 0)
    cut = CacheOrder(dataset, 3, batch, lambda: 0, drop_last=True)
    order = list(filled)
    assert (len(order), len(list(cut))) == (len(filled), len(cut)) == (steps * batch, whole * batch)
    assert sorted(order[:18]) == list(range(18)) and set(order[18:]) <= {~order[17]}
    assert list(cut) == order[: whole * batch]
    last, *fillers = (dataset[index] for index in order[17:])
    assert last.loss_mask.any() and {one.id for one in fillers} <= {last.id}
    assert not any(one.loss_mask.any() for one in fillers)
    collate = Collator(SPECS, 2, drop_idle=True)
    assert len(collate([last, *fillers])["labels"]) == 1
    assert all((collate(fillers[:n])["labels"] == IGNORE).all() for n in range(1, len(fillers)))
