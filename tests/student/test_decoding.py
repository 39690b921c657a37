"""Batches decoded on the device say what the store's own decoder says, and what went in within the bounds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from featurestore.format.codec import LOGPROB_ERROR, LSE_ERROR, ROW_ERROR
from featurestore.format.schema import (
    GroupSpec,
    HiddenFeatures,
    HiddenSpec,
    LogitsFeatures,
    LogitsSpec,
    LseSpec,
)
from featurestore.reader import CacheReader
from student.data.batches import Collator
from student.data.decoding import MIN_TAIL, decode_hidden, decode_labels, decode_targets, temper
from tests.featurestore.conftest import fill
from tests.student.caches import random_samples, write_cache
from tests.student.reference import rows_of

SPECS: list[GroupSpec] = [
    LogitsSpec(8, 0.9, tail=6),
    HiddenSpec(1, "bf16"),
    HiddenSpec(2, "int8"),
    HiddenSpec(3, "fp8"),
    HiddenSpec(4, "f32"),
    HiddenSpec(0, "int4"),
]


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> CacheReader:
    return CacheReader.open(fill(tmp_path_factory.mktemp("decoding") / "store", SPECS).path)


def batch_of(reader: CacheReader, groups: list[GroupSpec], indices: list[int]) -> dict[str, Any]:
    return Collator(groups, pad_token=0)([reader.read_codes(i, groups) for i in indices])


@pytest.mark.parametrize(
    "spec",
    [SPECS[0], LogitsSpec(8, 0.9), LogitsSpec(3, 0.9), LogitsSpec(8, 0.4), LogitsSpec(8, 0.9, tail=2)],
    ids=["all", "no draws", "smaller k", "smaller p", "fewer draws"],
)
def test_every_row_has_the_distribution_of_the_stores_decoder(reader: CacheReader, spec: LogitsSpec) -> None:
    indices = [3, 0, 7, 1]
    batch = batch_of(reader, [spec], indices)
    for row, index in enumerate(indices):
        features = reader.read(index, [spec]).features[spec]
        assert isinstance(features, LogitsFeatures)
        length = len(features.counts)
        coded = {name: part[row, :length] for name, part in batch["coded_head"].items()}
        found = decode_targets(coded, torch.zeros(length, dtype=torch.long))
        for t, (p, outside, entropy) in enumerate(rows_of(features)):
            real = torch.isfinite(found.logprob_NK[t])
            columns = dict(
                zip(found.ids_NK[t, real].tolist(), found.logprob_NK[t, real].exp().tolist(), strict=True)
            )
            assert columns.keys() == p.keys() and int(real.sum()) == len(p)
            assert columns == pytest.approx(p, rel=1e-4, abs=1e-6)
            assert (found.ids_NK[t, ~real] == found.ids_NK[t, 0]).all()
            assert found.tail_N[t].exp().item() == pytest.approx(outside, abs=2e-5)
            assert sum(columns.values()) + found.tail_N[t].exp().item() == pytest.approx(1, abs=1e-5)
            if found.entropy_N is not None:
                assert found.entropy_N[t].item() == pytest.approx(entropy, nan_ok=True)
        labels = decode_labels(coded["label_logprob"])
        np.testing.assert_allclose(labels[:-1], features.label_logprob[:-1], rtol=1e-6)
        assert torch.isnan(labels[-1])


def test_what_went_in_comes_out_within_the_documented_bound(tmp_path: Path) -> None:
    spec = LogitsSpec(5)
    filled = fill(tmp_path / "store", [spec], count=6)
    reader = CacheReader.open(filled.path)
    batch = batch_of(reader, [spec], list(range(6)))
    for row, sample_id in enumerate(reader.sample_ids):
        given = filled.given[sample_id][spec]
        assert isinstance(given, LogitsFeatures)
        length = len(given.counts)
        coded = {name: part[row, :length] for name, part in batch["coded_head"].items()}
        found = decode_targets(coded, torch.zeros(length, dtype=torch.long))
        exact = torch.from_numpy((given.logits - np.repeat(given.lse, given.counts)).reshape(length, 5))
        assert (found.logprob_NK - exact).abs().max() <= LOGPROB_ERROR + 1e-5
        labels = decode_labels(coded["label_logprob"])[:-1]
        assert np.abs(labels.numpy() - given.label_logprob[:-1]).max(initial=0) <= ROW_ERROR + 1e-6


@pytest.mark.parametrize("temperature", [0.5, 2.0, 8.0])
def test_heads_at_other_temperatures_are_those_of_the_logits(
    temperature: float, teacher: Path, tmp_path: Path
) -> None:
    """log p_T = (log p + lse) / T - lse_T: each number off by its rounding."""
    specs: list[GroupSpec] = [LogitsSpec(9), LseSpec(temperature)]
    samples = random_samples(6, 199)
    reader = CacheReader.open(write_cache(tmp_path / "store", teacher, samples, specs))
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    batch = batch_of(reader, specs, [0, 1, 2, 3, 4, 5])
    bound = (LOGPROB_ERROR + ROW_ERROR) / temperature + LSE_ERROR + 1e-4
    for row, index in enumerate(range(6)):
        tokens = torch.from_numpy(reader.read(index).tokens).long()
        with torch.no_grad():
            exact = (model(tokens[None]).logits[0].double() / temperature).log_softmax(-1)
        coded = {name: part[row, : len(tokens)] for name, part in batch["coded_head"].items()}
        found = decode_targets(coded, tokens)
        tempered = found.tempered[temperature]
        head = exact.gather(1, found.ids_NK)
        assert (tempered.logprob_NK - head).abs().max() <= bound
        mass = tempered.logprob_NK.exp().sum(-1) + tempered.tail_N.exp()
        torch.testing.assert_close(mass, torch.ones_like(mass), rtol=0, atol=1e-5)
        assert (tempered.tail_N.exp() - (1 - head.exp().sum(-1))).abs().max() <= math.expm1(bound)


def test_a_head_of_more_than_all_mass_is_scaled() -> None:
    """Roundings may leave it so where the head holds nearly everything; without a tail it holds it all."""
    logprob = torch.tensor([[0.0, -9.0, -math.inf]] * 2).log_softmax(-1)
    lse = torch.tensor([64, 64])  # one nat
    tempered = temper(logprob, torch.tensor([-14.0, -math.inf]), lse, 2.0, torch.tensor([0.4, 0.4]))
    mass = tempered.logprob_NK.exp().sum(-1)
    torch.testing.assert_close(mass, torch.tensor([1 - MIN_TAIL, 1.0]))
    assert tempered.tail_N[0].exp().item() == pytest.approx(MIN_TAIL, rel=0.1)
    assert tempered.tail_N[1] == -math.inf and torch.isneginf(tempered.logprob_NK[:, 2]).all()


def test_padding_is_no_distribution_that_could_disturb(reader: CacheReader) -> None:
    lengths = reader.lengths.tolist()
    longest, shortest = int(np.argmax(lengths)), int(np.argmin(lengths))
    coded = batch_of(reader, [SPECS[0]], [longest, shortest])["coded_head"]
    rows = {name: part[1, lengths[shortest] :] for name, part in coded.items()}
    found = decode_targets(rows, torch.zeros(len(rows["odds"]), dtype=torch.long))
    assert not torch.isnan(found.logprob_NK).any() and (found.ids_NK < reader.identity.vocab_size).all()


def test_hidden_states_are_those_of_the_stores_decoder(reader: CacheReader) -> None:
    batch = batch_of(reader, SPECS[1:], [2, 5])
    for spec in SPECS[1:]:
        assert isinstance(spec, HiddenSpec)
        coded = batch["coded_hidden"][spec.layer]
        for row, index in enumerate((2, 5)):
            features = reader.read(index, [spec]).features[spec]
            assert isinstance(features, HiddenFeatures)
            length = len(features.values)
            found = decode_hidden({name: part[row, :length] for name, part in coded.items()})
            assert found.dtype == (torch.bfloat16 if spec.dtype == "bf16" else torch.float32)
            np.testing.assert_array_equal(found.float().numpy(), features.to_float32())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_same_on_a_gpu(reader: CacheReader) -> None:
    coded = batch_of(reader, [SPECS[0]], [3, 0, 7, 1])["coded_head"]
    rows = {name: part.flatten(0, 1) for name, part in coded.items()}
    here = decode_targets(rows, torch.zeros(len(rows["odds"]), dtype=torch.long))
    there = decode_targets({n: p.cuda() for n, p in rows.items()}, here.label_N.cuda())
    assert torch.equal(here.ids_NK, there.ids_NK.cpu())
    torch.testing.assert_close(here.logprob_NK, there.logprob_NK.cpu())
