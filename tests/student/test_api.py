"""The notebook's functions show and train what the command does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from featurestore.errors import MissingFeatureError
from featurestore.format.schema import HiddenSpec
from featurestore.reader import CacheReader
from student.api import Experiment, expectations
from student.errors import UserError
from tests.student.caches import random_samples, write_cache
from tests.teachers import word_tokenizer

FLAGS = {
    "student_model_config": {"num_hidden_layers": 2},
    "ce_weight": 0.5,
    "max_steps": 3,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 4,
    "eval_fraction": 0.25,
    "logging_steps": 1,
    "report_to": "none",
    "json": True,
}


def test_a_sample_is_shown_as_text(cache: Path) -> None:
    reader = CacheReader.open(cache)
    rows = expectations(reader, 1, limit=4, best=2)
    spec = reader.find("logits")
    sample = reader.read(1, [spec])
    head: Any = sample.features[spec]
    tokenizer = word_tokenizer(199)
    assert [row["token"] for row in rows] == [tokenizer.decode([t]) for t in sample.tokens[:4]]
    assert [row["next"] for row in rows] == [tokenizer.decode([t]) for t in sample.tokens[1:5]]
    assert rows[2]["best"][0][0] == tokenizer.decode([head.ids[2 * 16]])
    assert all(len(row["best"]) == 2 and row["best"][0][1] >= row["best"][1][1] > 0 for row in rows)
    last = expectations(reader, 1, limit=1000)[-1]
    assert (last["position"], last["next"]) == (len(sample.tokens) - 1, None)


def test_an_experiment_is_the_command_in_parts(
    cache: Path, tmp_path: Path, distily_train: Callable[..., tuple[int, str, str]]
) -> None:
    experiment = Experiment(cache, tmp_path / "api", **FLAGS)
    batch = next(experiment.batches())
    found = experiment.losses(batch)
    assert list(found) == ["loss", "kl", "ce"]
    loss = found["loss"].detach()
    assert float(loss) == pytest.approx(float(found["kl"] + 0.5 * found["ce"]), rel=1e-6)
    found["loss"].backward()
    assert all(p.grad is not None for p in experiment.model.student.parameters())
    summary = experiment.train()
    logged = json.loads((tmp_path / "api" / "trainer_state.json").read_text())["log_history"]
    first = next(entry for entry in logged if "loss" in entry)
    # The batch is the first of training, and what was asked of it before leaves no trace.
    assert first["loss_kl"] == pytest.approx(float(found["kl"]), rel=1e-6)
    words = [f"--{name.replace('_', '-')}" for name in FLAGS]
    values = [json.dumps(v) if isinstance(v, dict) else str(v) for v in FLAGS.values()]
    pairs = [word for pair in zip(words, values, strict=True) for word in pair]
    code, out, err = distily_train(cache, "--output-dir", tmp_path / "command", *pairs)
    assert code == 0, err
    assert json.loads(out)["last_eval"] == summary["last_eval"]
    # Whatever process it is in, an experiment records the command that does the same.
    begin = ["distily-train", "from-cache", str(cache), "--output-dir"]
    assert summary["command"] == [*begin, str(tmp_path / "api"), *pairs]


def test_what_the_command_refuses_is_refused(cache: Path, tmp_path: Path, teacher: Path) -> None:
    with pytest.raises(UserError, match="unknown flag --learning-rat; did you mean --learning-rate"):
        Experiment(cache, tmp_path, learning_rat=1e-3)
    bare = write_cache(tmp_path / "bare", teacher, random_samples(4, 199), [HiddenSpec(1, "bf16")])
    with pytest.raises(MissingFeatureError, match="--top-k K"):
        expectations(CacheReader.open(bare), 0)
