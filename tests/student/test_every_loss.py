"""Every loss of the catalogue, from a cache that `distily-cache` made, trains and reduces itself."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from student.objective.catalogue import catalogue
from tests.teachers import WORDS

STEPS = 20
# Hidden states 1 and 2 serve losses between layers, 1 is also the input of block 1.
FEATURES = ("--top-k", 8, "--tail", 8, "--final", "--hidden-layers", "1,2", "--relation-layers", 1)


@pytest.fixture(scope="module")
def full_cache(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    """64 short texts of the tiny teacher with everything that any loss needs."""
    folder = tmp_path_factory.mktemp("every")
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(WORDS, size=random.integers(12, 24))) for _ in range(64)]
    data = folder / "texts.jsonl"
    data.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    command = [Path(sys.executable).parent / "distily-cache", "generate", teacher, data]
    options = ["--out", folder / "store", "--engine", "transformers", "--hidden-dtype", "f32", *FEATURES]
    done = subprocess.run(
        [*map(str, command), *map(str, options)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "store"


@pytest.mark.parametrize("name", list(catalogue()))
def test_it_trains_and_reduces_itself(
    name: str, full_cache: Path, tmp_path: Path, distily_train: Callable[..., tuple[int, str, str]]
) -> None:
    objective = tmp_path / "objective.yaml"
    objective.write_text(yaml.safe_dump({"terms": [{"loss": name, "weight": 1.0}]}))
    flags: dict[str, Any] = {
        "objective": objective,
        "student-model-config": '{"num_hidden_layers": 2}',
        "init": "random",
        "per-device-train-batch-size": 64,
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
    }
    words = [word for flag, value in flags.items() for word in (f"--{flag}", value)]
    code, _, err = distily_train(full_cache, "--output-dir", tmp_path / "out", *words)
    assert code == 0, err
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert len(losses) == STEPS and np.isfinite(losses).all()
    # One batch is the whole data set, so that steps differ by what was learned and by nothing else.
    assert np.mean(losses[-3:]) < losses[0] - 0.02 * abs(losses[0]), losses
