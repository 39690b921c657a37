"""Every loss of the catalogue, from a cache that `distily-cache` made, trains and reduces itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from student.losses.catalogue import catalogue
from tests.command import generate
from tests.teachers import WORDS

STEPS, SAMPLES = 10, 32
# Hidden states 1 and 2 serve losses between layers, 1 is also the input of block 1.
FEATURES = ("--top-k", 8, "--tail", 8, "--temperatures", 2, "--hidden-layers", "1,2")
FEATURES += ("--final", "--relation-layers", 1)


@pytest.fixture(scope="module")
def full_cache(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    """`SAMPLES` short texts of the tiny teacher with everything that any loss needs."""
    folder = tmp_path_factory.mktemp("every")
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(WORDS, size=random.integers(12, 24))) for _ in range(SAMPLES)]
    data = folder / "texts.jsonl"
    data.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    generate(teacher, data, folder / "store", "--hidden-dtype", "f32", *FEATURES)
    return folder / "store"


@pytest.fixture
def learn(
    full_cache: Path, tmp_path: Path, distily_train: Callable[..., tuple[int, str, str]]
) -> Callable[..., list[dict[str, Any]]]:
    """Trains on an objective, all samples in each step; the entries of its log."""

    def run(request: dict[str, Any], *more: object) -> list[dict[str, Any]]:
        objective = tmp_path / "objective.yaml"
        objective.write_text(yaml.safe_dump(request))
        flags: dict[str, Any] = {
            "objective": objective,
            "student-model-config": '{"num_hidden_layers": 2}',
            "init": "random",
            "per-device-train-batch-size": SAMPLES,
            "max-steps": STEPS,
            "learning-rate": 3e-3,
            "lr-scheduler-type": "constant",
            "warmup-steps": 0,
            "logging-steps": 1,
            "eval-strategy": "no",
            "eval-on-start": "False",
            "eval-fraction": 0,
            "save-strategy": "no",
            "report-to": "none",
            "overwrite-output-dir": "True",
        }
        words = [word for flag, value in flags.items() for word in (f"--{flag}", value)]
        code, _, err = distily_train(full_cache, "--output-dir", tmp_path / "out", *words, *more)
        assert code == 0, err
        log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
        return [entry for entry in log if "loss" in entry]

    return run


@pytest.mark.parametrize("name", list(catalogue()))
def test_it_trains_and_reduces_itself(name: str, learn: Callable[..., list[dict[str, Any]]]) -> None:
    losses = [entry["loss"] for entry in learn({"terms": [{"loss": name, "weight": 1.0}]})]
    assert len(losses) == STEPS and np.isfinite(losses).all()
    # One batch is the whole data set, so that steps differ by what was learned and by nothing else.
    assert np.mean(losses[-3:]) < losses[0] - 0.02 * abs(losses[0]), losses


def test_a_ternary_student_learns_everything_at_once(learn: Callable[..., list[dict[str, Any]]]) -> None:
    """All losses in one objective, those with a temperature at 2, their gradients balanced."""
    terms = [
        {"loss": name, **({"temperature": 2.0} if "temperature" in loss.options else {})}
        for name, loss in catalogue().items()
    ]
    bitnet = ("--student-model-as-bitnet", "--gradient_checkpointing", "True", "--bf16", "--max_steps", 2)
    entries = learn({"terms": terms, "balance": "gradient_norm"}, *bitnet)
    assert sum(key.startswith("loss_") for key in entries[0]) >= len(terms)
    assert all(np.isfinite(list(entry.values())).all() for entry in entries)
    assert entries[-1]["loss_kl"] < entries[0]["loss_kl"]


def test_a_batch_with_nothing_to_learn_changes_no_loss(learn: Callable[..., list[dict[str, Any]]]) -> None:
    """16 samples three times for 32 are filled up with 16 that teach nothing."""
    request = {"terms": [{"loss": name} for name in catalogue()]}
    once = learn(request, "--max_steps", 1)[0]
    filled = ("--per-device-train-batch-size", SAMPLES // 2, "--gradient-accumulation-steps", 3)
    thrice = learn(request, "--max_steps", 1, *filled)[0]
    # A sum over the tokens of a batch rounds by at most their number times eps.
    bound = once["num_input_tokens_seen"] * float(np.finfo(np.float32).eps)
    losses = [key for key in once if "loss" in key or key == "grad_norm"]
    assert len(losses) > len(catalogue())
    assert [thrice[key] for key in losses] == pytest.approx([once[key] for key in losses], rel=bound)
