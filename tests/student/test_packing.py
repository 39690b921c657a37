"""Packed rows: planning, what lies where, and the same loss and gradients as one sample to a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from featurestore.format.codes import LogitsCodes
from featurestore.format.schema import HiddenFeatures, HiddenSpec, LogitsSpec
from featurestore.reader import CacheReader
from student.data.batches import IGNORE, CachedDataset, Collator
from student.data.packing import check_packing, plan_rows, position_ids
from student.errors import UserError
from student.objective.terms import Objective, term
from student.training.model import DistillationModel
from tests import architectures, teachers
from tests.student.caches import random_samples, write_cache
from tests.student.conftest import SPECS


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(0, 60))
def test_rows_hold_every_sample_once_and_no_two_rows_fit_together(lengths: list[int], spare: int) -> None:
    limit = max(lengths) + spare
    rows = plan_rows(lengths, limit)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    sizes = [sum(lengths[index] for index in row) for row in rows]
    assert max(sizes) <= limit
    assert all(a + b > limit for i, a in enumerate(sizes) for b in sizes[:i])


def test_positions_begin_anew_with_each_sample() -> None:
    ids = position_ids([[3, 1, 1], [6]], 7)
    assert ids.tolist() == [[0, 1, 2, 0, 0, 1, 2], [0, 1, 2, 3, 4, 5, 6]]


def test_a_packed_batch_holds_each_sample_whole(cache: Path) -> None:
    dataset = CachedDataset(CacheReader.open(cache), range(36), SPECS)
    samples = [dataset[index] for index in range(36)]
    batch = Collator(SPECS, 2, pack=True)(samples)
    assert batch["input_ids"].shape[1] == max(len(sample.tokens) for sample in samples)
    assert len(batch["input_ids"]) < 36
    starts = [(int(r), int(t)) for r, t in (batch["position_ids"] == 0).nonzero()]
    found = []
    for row, start in starts:
        (index,) = (
            i
            for i, sample in enumerate(samples)
            if batch["input_ids"][row, start : start + len(sample.tokens)].tolist() == sample.tokens.tolist()
            and i not in found
        )
        found.append(index)
        check_place(batch, samples[index], row, start)
    assert sorted(found) == list(range(36))
    assert batch["attention_mask"].sum() == sum(len(sample.tokens) for sample in samples)


def check_place(batch: dict[str, Any], sample: Any, row: int, start: int) -> None:
    place = slice(start, start + len(sample.tokens))
    labels = np.where(sample.loss_mask[1:], sample.tokens[1:], IGNORE).tolist()
    assert batch["labels"][row, place].tolist() == [*labels, IGNORE]
    for spec, codes in sample.features.items():
        if isinstance(codes, LogitsCodes):
            assert batch["coded_head"]["ids"][row, place].flatten().tolist() == codes.ids.tolist()
            assert batch["coded_head"]["odds"][row, place].tolist() == codes.odds.tolist()
        elif isinstance(codes, HiddenFeatures):
            got = batch["coded_hidden"][spec.layer]["values"][row, place]
            np.testing.assert_array_equal(got.float().numpy(), codes.to_float32())


ALL_TERMS = Objective.of(
    [
        term("kl", 1.0),
        term("ce", 0.5),
        term("hidden_mse", 1.0, (2, 1)),
        term("hidden_similarity", 10.0, (2, 1)),
        term("hidden_rkd_distance", 10.0, (2, 1)),
        term("hidden_rkd_angle", 10.0, (2, 1)),
        term("hidden_fsp", 1.0, (1, 1), following=(2, 2)),
    ]
)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
def test_loss_and_gradients_are_those_of_one_sample_to_a_row(
    architecture: str, attention: str, tmp_path: Path
) -> None:
    """Gemma 3 has sliding windows of 32 positions here, and samples are longer than that."""
    path = getattr(teachers, architecture)(tmp_path / "teacher", vocab_size=199)
    specs = [LogitsSpec(8), HiddenSpec(1, "f32"), HiddenSpec(2, "f32")]
    samples = random_samples(8, 199, lengths=(3, 80))
    store = write_cache(tmp_path / "store", path, samples, specs, shard_tokens=10_000)
    student = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=attention)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    check_packing(student)
    model = DistillationModel(student, ALL_TERMS).train()
    dataset = CachedDataset(CacheReader.open(store), range(8), specs)
    batches = [Collator(specs, 0, pack)([dataset[i] for i in range(8)]) for pack in (False, True)]
    assert len(batches[1]["input_ids"]) < 8 and "position_ids" not in batches[0]
    assert (batches[1]["position_ids"] == 0).sum() == 8
    results = []
    for batch in batches:
        model.zero_grad()
        output = model(**batch)
        output["loss"].backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append((output["terms"], gradients))
    (terms, gradients), (packed_terms, packed) = results
    torch.testing.assert_close(packed_terms, terms, rtol=1e-4, atol=1e-6)
    assert (terms > 0).all()
    # Sums in another order in float32: relative to the largest entry, a few hundred roundings.
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            packed[name], gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item(), msg=name
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["mixtral", "gemma2", "gemma3n_text", "gpt2"])
def test_masks_keep_samples_apart_whatever_rounds(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The experts of a mixture multiply tokens of both samples together, which rounds differently."""
    path = architectures.make(kind, tmp_path)
    check_packing(AutoModelForCausalLM.from_pretrained(path, dtype=dtype))


def test_positions_that_are_counted_from_a_mask_are_refused(tmp_path: Path) -> None:
    student = AutoModelForCausalLM.from_pretrained(architectures.make("opt", tmp_path))
    with pytest.raises(UserError, match="--pack-rows: OPTForCausalLM"):
        check_packing(student)


@pytest.mark.parametrize("factor", [1.0, 20.0, 20_000.0])
def test_layers_that_carry_a_state_along_are_refused(factor: float, tmp_path: Path) -> None:
    """However little they carry: beside embeddings times 20,000, one part in 10^8."""
    student = AutoModelForCausalLM.from_pretrained(teachers.lfm2(tmp_path), dtype=torch.float32)
    with torch.no_grad():
        student.get_input_embeddings().weight.mul_(factor)
    with pytest.raises(UserError, match="--pack-rows: Lfm2ForCausalLM"):
        check_packing(student)
