"""Losses on hidden states of a share of the positions are those of all positions, on average."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from featurestore.format.schema import HiddenSpec
from featurestore.maintenance.info import store_info
from featurestore.reader import CacheReader
from student.data.batches import IGNORE, Collator
from student.data.dataset import DistillationDataset
from student.data.teacher_weights import TeacherParts
from student.losses.catalogue import catalogue
from student.objective.projectors import ProjectorSpec
from student.objective.terms import Objective, term
from student.training.model import DistillationModel, select
from tests.command import generate
from tests.student.caches import put_head
from tests.teachers import text_of

SHARE, SEEDS, SAMPLES = 0.3, 200, 6
FULL = HiddenSpec(3, "f32")


def batch_of(cache: Path, spec: HiddenSpec, pack: bool = False) -> dict[str, Any]:
    reader = CacheReader.open(cache)
    return Collator([spec], 2, pack)([reader.read_codes(index, [spec]) for index in range(SAMPLES)])


def model_of(teacher: Path, name: str, store: int = 0) -> DistillationModel:
    config = LlamaConfig.from_pretrained(teacher)
    config.num_hidden_layers = 2
    torch.manual_seed(1)
    student = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    one = replace(term(name, 1.0, (3, 2), projector=ProjectorSpec("linear", 64, 64)), teachers=(store,))
    teachers = [TeacherParts() for _ in range(store + 1)]
    return DistillationModel(student, Objective.of([one]), *teachers).train()


def learned(model: DistillationModel, batch: dict[str, Any], name: str) -> torch.Tensor:
    """The loss of each learned position, [N], by transformers' own hidden states."""
    states = model.student(input_ids=batch["input_ids"], output_hidden_states=True).hidden_states[2]
    places = (batch["labels"].flatten() != IGNORE).nonzero().squeeze(1)
    (projector,) = model.projectors.values()
    theirs = select(batch["coded_hidden"][3]["values"], places)
    values: torch.Tensor = catalogue()[name].function(projector(select(states, places)), theirs)
    return values.detach().double()


@pytest.mark.parametrize("name", ["hidden_mse", "hidden_cosine", "hidden_logsum"])
def test_loss_and_gradient_are_unbiased(name: str, teacher: Path, cache: Path) -> None:
    """Each position counts 1/F with probability F: its part of the sum has a variance of (1 - F) / F of its
    square. Dividing by the number of kept positions instead would have another variance, and a bias.
    """
    model, full = model_of(teacher, name), batch_of(cache, FULL)
    weight = model.student.get_decoder().layers[0].self_attn.q_proj.weight

    def run(batch: dict[str, Any]) -> tuple[float, torch.Tensor]:
        model.zero_grad()
        loss = model(**batch)["loss"]
        loss.backward()
        return loss.item(), weight.grad.double()

    exact, slope = run(full)
    values_N = learned(model, full, name)
    assert exact == pytest.approx(float(values_N.mean()), rel=1e-5)
    found = [run(batch_of(cache, HiddenSpec(3, "f32", SHARE, seed))) for seed in range(SEEDS)]
    losses, slopes = np.array([loss for loss, _ in found]), torch.stack([slope for _, slope in found])

    variance = (1 - SHARE) / SHARE * float(values_N.square().sum()) / len(values_N) ** 2
    assert abs(losses.mean() - exact) <= 4 * (variance / SEEDS) ** 0.5
    # The variance of a sample variance is about 2 / n of its square: five standard deviations.
    assert np.square(losses - exact).mean() == pytest.approx(variance, rel=5 * (2 / SEEDS) ** 0.5)
    spread = (slopes - slope).square().sum((1, 2)).mean()
    assert (slopes.mean(0) - slope).square().sum() <= 4 * spread / SEEDS
    assert spread > 0.1 * slope.square().sum()


def test_a_batch_counts_what_is_kept_by_the_inverse_of_its_share(teacher: Path, cache: Path) -> None:
    """Whether samples are packed or not, and where a sample has none."""
    model, share = model_of(teacher, "hidden_mse"), HiddenSpec(3, "f32", SHARE, 5)
    batch = batch_of(cache, share)
    places = (batch["labels"].flatten() != IGNORE).nonzero().squeeze(1)
    kept_N = select(batch["coded_hidden"][3]["weight"], places) > 0
    values_N = learned(model, batch_of(cache, FULL), "hidden_mse")
    expected = float(values_N[kept_N].sum()) / SHARE / len(values_N)
    for pack in (False, True):
        assert model(**batch_of(cache, share, pack))["loss"].item() == pytest.approx(expected, rel=1e-4)
    # The same of a second cache, whose first one has the states at all positions.
    further = {"further": {1: {"coded_hidden": batch["coded_hidden"]}}}
    second = model_of(teacher, "hidden_mse", store=1)(**batch_of(cache, FULL), **further)
    assert second["loss"].item() == pytest.approx(expected, rel=1e-4)
    nothing = model(**batch_of(cache, HiddenSpec(3, "f32", 1e-9)))["loss"]
    nothing.backward()
    assert nothing.item() == 0.0


def test_a_data_set_says_where_the_states_are(cache: Path) -> None:
    share = HiddenSpec(3, "f32", SHARE, 5)
    some, every = (DistillationDataset(cache, [spec], range(4)) for spec in (share, FULL))
    for own, item in zip(some, every, strict=True):
        weight = own["teacher_hidden_3_weight"]
        torch.testing.assert_close(weight[weight > 0], torch.full_like(weight[weight > 0], 1 / SHARE))
        assert torch.equal(own["teacher_hidden_3"][weight > 0], item["teacher_hidden_3"][weight > 0])
    batch = DistillationDataset.collate([some[0], some[1]])
    assert batch["teacher_hidden_3_weight"].shape == batch["input_ids"].shape


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    """Layers 1 and 3 at half of the positions in int4, a fifth of them before the others, and the teacher's
    head.
    """
    folder = tmp_path_factory.mktemp("share")
    texts = [json.dumps({"text": text_of(30, seed)}) for seed in range(24)]
    (folder / "texts.jsonl").write_text("\n".join(texts))
    layers = ("--hidden-layers", "1,3", "--hidden-dtype", "int4", "--hidden-positions")
    for share in (0.2, 0.5):
        generate(teacher, folder / "texts.jsonl", folder / "store", "--top-k", 8, *layers, share)
    put_head(folder / "store", teacher)
    return folder / "store"


def test_a_training_on_a_share(
    store: Path, distily: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    student = ("--student-model-config", '{"num_hidden_layers": 2}', "--hidden-loss", "cosine")
    quick = ("--max-steps", 2, "--eval-fraction", 0.3, "--report-to", "none", "--pack-rows")
    code, planned, err = distily("plan", store, *student, "--json")
    assert code == 0 and "peak_bytes" in planned, err
    code, _, err = distily("from-cache", store, "--output-dir", tmp_path / "out", *student, *quick)
    assert code == 0, err
    held = json.loads((tmp_path / "out" / "summary.json").read_text())["cache_cost"]["groups"]
    parts = [one.bytes for one in store_info(store).groups.values() if one.kind == "hidden.L1"]
    assert len(parts) == 2 and held["hidden.L1"]["bytes"] == sum(parts)
    code, printed, err = distily("eval", tmp_path / "out", "--json")
    # The head would give the full distribution, if the final states were there at all positions.
    assert code == 0 and '"lower bound"' in printed, err


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--hidden-loss", "similarity"), "--hidden-layers 1"),
        (("--hidden-loss", "rkd_distance", "--hidden-layers", "3"), "--hidden-layers 3"),
        (("--objective", '{"terms": [{"loss": "full_kl"}]}'), "--final"),
    ],
)
def test_losses_that_need_all_positions_are_refused(
    store: Path, refused: Callable[..., str], tmp_path: Path, flags: tuple[str, ...], line: str
) -> None:
    found = refused("from-cache", store, "--output-dir", tmp_path / "out", *flags)
    assert "at 0.5 of them" in found and f"generate ... {line}` without --hidden-positions" in found
