"""Every loss of the catalogue in a whole training, from a cache that `distily-cache generate` made."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from student.objective.catalogue import catalogue
from tests import teachers
from tests.student.caches import save_teacher

Run = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).parents[2]
FLAGS = "--top-k 12 --top-p 0.7 --tail 16 --temperatures 2 --hidden-layers 1,2 --final --relation-layers 1"
# Losses that a schedule or a balance would hide are at rest: one term each, at its defaults.
TEMPERED = [loss.name for loss in catalogue().values() if "temperature" in loss.options]


@pytest.fixture(scope="session")
def full_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All column groups and the sidecar of a tiny teacher, captured by the transformers engine."""
    folder = tmp_path_factory.mktemp("full-cache")
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(teachers.WORDS, size=24).tolist()) for _ in range(32)]
    (folder / "corpus.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    command = [
        str(Path(sys.executable).parent / "distily-cache"),
        "generate",
        str(save_teacher(folder / "teacher")),
    ]
    command += [str(folder / "corpus.jsonl"), "--out", str(folder / "store"), "--engine", "transformers"]
    done = subprocess.run([*command, *FLAGS.split()], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "store"


@pytest.fixture
def learn(distily_train: Run, full_cache: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Twenty steps of an objective; the summary."""

    def run(objective: dict[str, Any], *arguments: object) -> dict[str, Any]:
        (tmp_path / "objective.yaml").write_text(yaml.safe_dump(objective))
        flags = ["--objective", tmp_path / "objective.yaml", "--max_steps", 20, "--learning-rate", 3e-3]
        flags += ["--per-device-train-batch-size", 8, "--eval-fraction", 0.2, "--report-to", "none"]
        flags += ["--student-model-config", '{"num_hidden_layers": 2}', "--init", "random"]
        flags += ["--eval_steps", 20, "--save_strategy", "no", "--disable_tqdm", "True", "--json"]
        code, out, err = distily_train(full_cache, "--output-dir", tmp_path / "out", *flags, *arguments)
        assert code == 0, err
        summary: dict[str, Any] = json.loads(out)
        return summary

    return run


@pytest.mark.parametrize("name", list(catalogue()))
def test_twenty_steps_reduce_the_loss_itself(name: str, learn: Callable[..., dict[str, Any]]) -> None:
    summary = learn({"terms": [{"loss": name}]})
    first, last = summary["first_eval"]["eval_loss"], summary["last_eval"]["eval_loss"]
    assert math.isfinite(first) and last < first, (first, last)
