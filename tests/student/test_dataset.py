"""A cache as plain tensors: what the reader says of each sample, decoded and padded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from distily import CacheReader, DistillationDataset
from featurestore.errors import MissingFeatureError
from featurestore.format.codec import LOGPROB_ERROR, ROW_ERROR
from featurestore.format.schema import GroupSpec, HiddenFeatures, HiddenSpec, LogitsFeatures, LogitsSpec
from featurestore.store import FeatureStore
from tests.featurestore.helpers import features, identity, sample, task_of

LOGITS, INT8, FLOAT = LogitsSpec(8, 0.9, tail=6), HiddenSpec(2, "int8"), HiddenSpec(4, "f32")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """13 ragged samples in three shards: heads of up to eight tokens, six draws, two layers."""
    path = tmp_path_factory.mktemp("dataset") / "store"
    writer = FeatureStore.create(path, identity())
    groups: list[GroupSpec] = [LOGITS, INT8, FLOAT]
    parts = [[sample(seed) for seed in seeds] for seeds in (range(5), range(5, 9), range(9, 13))]
    writer.add_plan([task_of(part) for part in parts])
    for part in parts:
        writer.write_bundle(task_of(part), part, features(part, groups))
    writer.publish_manifest()
    return path


def test_items_are_what_the_reader_gives(store: Path) -> None:
    reader = CacheReader.open(store)
    data = DistillationDataset(reader)
    assert len(data) == 13
    for index in range(len(data)):
        item, read = data[index], reader.read(index)
        learned = read.loss_mask[1:]
        np.testing.assert_array_equal(item["input_ids"], read.tokens)
        np.testing.assert_array_equal(item["labels"][:-1], np.where(learned, read.tokens[1:], -100))
        assert item["labels"][-1] == -100
        for spec in (INT8, FLOAT):
            states = read.features[spec]
            assert isinstance(states, HiddenFeatures)
            np.testing.assert_array_equal(item[f"teacher_hidden_{spec.layer}"], states.to_float32())
        check_distribution(item, read.features[LOGITS])


def check_distribution(item: dict[str, torch.Tensor], given: object) -> None:
    """Columns are head and distinct draws; a row sums to one with what no column stands for."""
    assert isinstance(given, LogitsFeatures) and given.tail_ids is not None
    np.testing.assert_allclose(
        item["teacher_label_logprob"], given.label_logprob, atol=ROW_ERROR, rtol=0, equal_nan=True
    )
    total = item["teacher_logprobs"].double().exp().sum(-1) + item["teacher_rest"].double().exp()
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-5, rtol=0)
    ends = np.cumsum(given.counts.astype(int))
    for row, (count, end) in enumerate(zip(given.counts.astype(int), ends, strict=True)):
        used = torch.isfinite(item["teacher_logprobs"][row])
        ids = item["teacher_ids"][row][used].tolist()
        p = item["teacher_logprobs"][row][used].double().exp().numpy()
        head, logprob = given.ids[end - count : end], given.logits[end - count : end] - given.lse[row]
        assert ids[:count] == head.tolist()
        np.testing.assert_allclose(np.log(p[:count]), logprob, atol=2 * LOGPROB_ERROR + 1e-5, rtol=0)
        draws = given.tail_ids[row]
        if draws[0] < 0:  # no tail was sampled
            assert len(ids) == count
            continue
        tokens, repeats = np.unique(draws, return_counts=True)
        assert dict(
            zip(ids[count:], np.round(p[count:] / p[count:].sum() * len(draws)), strict=True)
        ) == dict(zip(tokens.tolist(), repeats, strict=True))


def test_batches_are_padded_items(store: Path) -> None:
    data = DistillationDataset(store)
    order = list(data.order(epoch=1, seed=3))
    assert sorted(order) == list(range(13)) and order != list(data.order(epoch=2, seed=3))
    assert order == list(DistillationDataset(store).order(epoch=1, seed=3))
    assert order[5:] == list(data.order(epoch=1, seed=3).starting(5))
    seen = 0
    for batch in DataLoader(data, batch_size=4, sampler=order, collate_fn=data.collate):
        longest = batch["input_ids"].shape[1]
        assert {tensor.shape[1] for tensor in batch.values()} == {longest}
        for row, index in enumerate(order[seen : seen + 4]):
            item, length = data[index], int(batch["attention_mask"][row].sum())
            assert length == len(item["input_ids"])
            for name, values in item.items():
                own = batch[name][row, :length]
                own = own[:, : values.shape[1]] if values.dim() > 1 else own
                torch.testing.assert_close(own, values, rtol=0, atol=0, equal_nan=True)
            assert bool((batch["labels"][row, length:] == -100).all())
            assert bool(torch.isneginf(batch["teacher_logprobs"][row, length:]).all())
            assert bool(
                torch.isneginf(batch["teacher_logprobs"][row, :, item["teacher_ids"].shape[1] :]).all()
            )
        seen += len(batch["input_ids"])
    assert seen == 13


def test_a_part_of_the_features_and_of_the_samples(store: Path) -> None:
    part = DistillationDataset(store, groups=[HiddenSpec(2, "int8")], samples=[7, 2])
    assert len(part) == 2 and set(part[0]) == {"input_ids", "labels", "teacher_hidden_2"}
    reader = CacheReader.open(store)
    np.testing.assert_array_equal(part[1]["input_ids"], reader.read(2).tokens)
    assert sorted(part.order(0)) == [0, 1]
    with pytest.raises(MissingFeatureError, match="hidden-layers 1"):
        DistillationDataset(store, groups=[HiddenSpec(1, "bf16")])[0]
