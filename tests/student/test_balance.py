"""Weights that move: schedules, and ratios of gradient norms, in whole trainings and by themselves."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from featurestore.reader import CacheReader
from student.data.batches import CachedDataset, Collator
from student.errors import StudentError
from student.objective.terms import Objective, term
from student.objective.weights import Weight
from student.training.balance import KEEP, GradientBalance, gradient_norms
from student.training.model import DistillationModel
from tests.student.conftest import SPECS

Train = Callable[..., dict[str, Any]]
TWO_LAYERS = ("--student-model-config", '{"num_hidden_layers": 2}', "--init", "random")
TERMS = [term("kl"), term("ce"), term("hidden_mse", 1.0, (1, 1)), term("hidden_cosine", 1.0, (3, 3))]


def write(folder: Path, **objective: Any) -> Path:
    file = folder / "objective.yaml"
    file.write_text(yaml.safe_dump(objective))
    return file


def logs(directory: Path) -> list[dict[str, Any]]:
    history = json.loads((directory / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


@pytest.fixture
def batch(cache: Path) -> dict[str, Any]:
    dataset = CachedDataset(CacheReader.open(cache), range(5), SPECS)
    return Collator(SPECS, 2)([dataset[index] for index in range(5)])


def model_of(teacher: Path, objective: Objective) -> DistillationModel:
    torch.manual_seed(1)
    student = AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(teacher), dtype=torch.float32)
    return DistillationModel(student, objective).train()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_norms_are_those_of_single_terms_and_leave_no_trace(
    checkpointing: bool, teacher: Path, batch: dict[str, Any]
) -> None:
    model = model_of(teacher, Objective.of(TERMS, balanced=True))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.weights = [0.3, 0.4, 0.5, 0.6]
    found = gradient_norms(model, batch)
    assert model.weights == [0.3, 0.4, 0.5, 0.6]
    assert all(parameter.grad is None for parameter in model.parameters())
    for norm, one in zip(found.tolist(), TERMS, strict=True):
        alone = model_of(teacher, Objective.of([one]))
        alone(**batch)["loss"].backward()
        parts = [p.grad.norm() for p in alone.student.get_decoder().layers.parameters() if p.grad is not None]
        assert norm == pytest.approx(torch.stack(parts).norm().item(), rel=1e-4)


def test_balanced_gradients_stand_to_each_other_as_the_weights(teacher: Path, batch: dict[str, Any]) -> None:
    wanted = [1.0, 0.5, 2.0, 3.0]
    model = model_of(teacher, Objective.of(TERMS, balanced=True))
    norms = gradient_norms(model, batch)
    balance = GradientBalance(4)
    assert balance.weights(wanted) == wanted
    balance.update(norms.tolist())
    lengths = torch.tensor(balance.weights(wanted)) * norms
    torch.testing.assert_close(lengths / lengths[0], torch.tensor(wanted))
    assert balance.weights(wanted)[0] == wanted[0]


def test_smoothing_is_geometric_and_skips_what_says_nothing() -> None:
    balance = GradientBalance(3)
    balance.update([1.0, 4.0, 0.0])
    balance.update([1.0, 16.0, math.inf])
    weights = balance.weights([1.0, 1.0, 1.0])
    assert weights[1] == pytest.approx(4.0 ** -(KEEP + 2 * (1 - KEEP)))
    assert weights[2] == 1.0


def test_the_state_survives_and_forgeries_do_not(tmp_path: Path) -> None:
    balance, again = GradientBalance(2), GradientBalance(2)
    balance.update([3.0, 0.0])
    balance.save(tmp_path)
    again.load(tmp_path)
    again.update([0.0, 6.0])
    assert again.weights([1.0, 1.0]) == [1.0, pytest.approx(0.5)]
    for text in ('{"log_norms": [1.0]}', '{"log_norms": [1.0, "x"]}', "[]", '{"log_norms": [1.0, NaN]}', "{"):
        (tmp_path / "balance.json").write_text(text)
        with pytest.raises(StudentError, match=r"balance\.json"):
            GradientBalance(2).load(tmp_path)


def test_a_balanced_training_resumes_bit_for_bit(train: Train, tmp_path: Path) -> None:
    file = write(
        tmp_path,
        balance="gradient_norm",
        terms=[{"loss": "kl"}, {"loss": "ce", "weight": 0.5}, {"loss": "hidden_mse", "weight": 0.5}],
    )
    arguments = (*TWO_LAYERS, "--objective", file, "--max_steps", 6, "--save_steps", 3, "--logging_steps", 1)
    arguments += ("--gradient_checkpointing", "True", "--gradient-accumulation-steps", 2)
    train(tmp_path / "straight", *arguments)
    first = logs(tmp_path / "straight")[0]
    assert first["weight_kl"] == 1.0 and first["weight_ce"] != 0.5
    train(tmp_path / "again", *arguments, "--resume_from_checkpoint", tmp_path / "straight" / "checkpoint-3")
    straight, again = (load_file(tmp_path / run / "model.safetensors") for run in ("straight", "again"))
    assert all(torch.equal(tensor, again[name]) for name, tensor in straight.items())


def test_a_schedule_moves_the_weight_between_steps(train: Train, tmp_path: Path) -> None:
    """The only term of the head begins at zero; the first step moves the student by the others alone."""
    schedule = {"schedule": "linear", "from": 0.0, "to": 2.0, "until": 0.5}
    file = write(tmp_path, terms=[{"loss": "kl", "weight": schedule}, {"loss": "hidden_mse"}])
    arguments = ("--objective", file, "--max_steps", 8, "--logging_steps", 1, "--learning-rate", 1e-3)
    summary = train(tmp_path / "out", *TWO_LAYERS, *arguments)
    entries = logs(tmp_path / "out")
    assert [entry["weight_kl"] for entry in entries] == [0.0, 0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0]
    for entry in entries:
        other = sum(0.5 * entry[f"loss_hidden_mse_L{pair}"] for pair in ("1_to_L1", "3_to_L2"))
        assert entry["loss"] == pytest.approx(entry["weight_kl"] * entry["loss_kl"] + other, rel=1e-4)
    assert summary["objective"]["kl"] == schedule
    assert "0→2 · kl" in (tmp_path / "out" / "report.html").read_text()


def test_a_head_of_weight_zero_gives_no_gradient(teacher: Path, batch: dict[str, Any]) -> None:
    model = model_of(teacher, Objective.of([term("kl", Weight(0.0, 1.0, "linear"))]))
    model(**batch)["loss"].backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_the_course_of_schedules() -> None:
    linear, cosine = Weight(1.0, 3.0, "linear", 0.5), Weight(1.0, 3.0, "cosine", 0.5)
    assert [linear.at(p) for p in (0.0, 0.25, 0.5, 1.0)] == [1.0, 2.0, 3.0, 3.0]
    assert [cosine.at(p) for p in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([1.0, 2.0, 3.0, 3.0])
    assert cosine.at(0.05) - 1.0 < (linear.at(0.05) - 1.0) / 2
    assert Weight.constant(0.7).at(0.3) == 0.7
    assert linear.scaled(0.5).at(0.25) == 1.0
