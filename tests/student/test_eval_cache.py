"""`eval` on real caches against both models' logits in float64."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from featurestore.format.codec import ROW_ERROR
from featurestore.format.schema import LogitsFeatures, LogitsSpec
from featurestore.reader import CacheReader
from student.data.batches import IGNORE, next_labels
from student.evaluation.command import evaluate
from student.evaluation.request import CacheOptions, EvalRequest
from student.metrics import calibration_error
from tests import teachers
from tests.student.exports import Students
from tests.student.splits import split_samples

Refused = Callable[..., str]
Run = Callable[..., tuple[int, str, str]]


def best_stored(reader: CacheReader, index: int) -> np.ndarray[Any, Any]:
    """Probability of the best token of each row of a sample, as the store rounds it; float64 [T]."""
    (features,) = reader.read(index, [LogitsSpec(16)]).features.values()
    assert isinstance(features, LogitsFeatures)
    starts = np.cumsum(features.counts, dtype=np.int64) - features.counts
    return np.exp(features.logits[starts].astype(np.float64) - features.lse)


@torch.no_grad()
def reference(student: Path, teacher: Path, reader: CacheReader, indices: list[int]) -> dict[str, Any]:
    """Every measure per position, float64 [N], from whole logits of both models."""
    models = [AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32).eval() for d in (student, teacher)]
    columns: dict[str, list[torch.Tensor]] = {}
    for index in indices:
        sample = reader.read(index, [])
        ids = torch.from_numpy(sample.tokens.astype(np.int64))[None]
        label = next_labels(ids, torch.from_numpy(sample.loss_mask)[None])[0]
        at = (label != IGNORE).nonzero()[:, 0]
        log_q, log_p = (model(ids).logits[0, at].double().log_softmax(-1) for model in models)
        q, p, y = log_q.exp(), log_p.exp(), label[at, None]
        stored = torch.from_numpy(best_stored(reader, index))
        for name, column in {
            "kl": (p * (log_p - log_q)).sum(-1),
            "reverse_kl": (q * (log_q - log_p)).sum(-1),
            "ce": -log_q.gather(1, y)[:, 0],
            "teacher_ce": -log_p.gather(1, y)[:, 0],
            "agree": (log_q.argmax(-1) == log_p.argmax(-1)).double(),
            "confidence": q.amax(-1),
            "right": (log_q.argmax(-1) == y[:, 0]).double(),
            "stored_confidence": stored[at],
            "teacher_right": (log_p.argmax(-1) == y[:, 0]).double(),
            "entropy": -(p * log_p).sum(-1),
            "position": at.double(),
            "sample": torch.full_like(at, index),
        }.items():
            columns.setdefault(name, []).append(column)
    return {name: torch.cat(parts).numpy() for name, parts in columns.items()}


def test_everything_is_what_both_models_logits_give(full_store: Path, teacher: Path, student: Path) -> None:
    found = evaluate(
        EvalRequest(directory=student, cache=CacheOptions(str(full_store), all_samples=True), batch_size=5)
    )["cache"]
    reader = CacheReader.open(full_store)
    wanted = reference(student, teacher, reader, list(range(len(reader))))
    own, theirs = found["student"], found["teacher"]
    assert found["exactness"] == {"kl": "exact", "reverse_kl": "exact"}
    assert (found["samples"], found["positions"]) == (12, len(wanted["ce"]))
    for name in ("ce", "kl", "reverse_kl"):
        assert own[name] == pytest.approx(wanted[name].mean(), rel=1e-4), name
    for name in ("kl", "reverse_kl"):
        sums = [wanted[name][wanted["sample"] == index] for index in range(len(reader))]
        left = [s.sum() - wanted[name].mean() * len(s) for s in sums if len(s)]
        error = np.sqrt(len(left) / (len(left) - 1) * np.square(left).sum()) / len(wanted[name])
        assert own[f"{name}_se"] == pytest.approx(error, rel=1e-3)
    assert own["perplexity"] == pytest.approx(np.exp(wanted["ce"].mean()), rel=1e-4)
    assert own["top1_agreement"] == wanted["agree"].mean()
    assert own["calibration_error"] == pytest.approx(
        calibration_error(wanted["confidence"], wanted["right"]), rel=1e-4
    )
    assert theirs["ce"] == pytest.approx(wanted["teacher_ce"].mean(), abs=ROW_ERROR)
    certain = calibration_error(wanted["stored_confidence"], wanted["teacher_right"])
    assert theirs["calibration_error"] == pytest.approx(certain, rel=1e-4)
    for row in found["by_position"]:
        inside = (wanted["position"] >= row["from"]) & (wanted["position"] < row["to"])
        assert row["positions"] == inside.sum()
        assert row["kl"] == pytest.approx(wanted["kl"][inside].mean(), rel=1e-4)
        assert row["ce"] == pytest.approx(wanted["ce"][inside].mean(), rel=1e-4)
    assert sum(row["positions"] for row in found["by_position"]) == found["positions"]
    assert sum(row["positions"] for row in found["by_entropy"]) == found["positions"]
    # Buckets follow the stored entropies, which are rounded; so their means do too, within a step.
    total = sum(row["kl"] * row["positions"] for row in found["by_entropy"])
    assert total == pytest.approx(wanted["kl"].sum(), rel=1e-4)
    assert found["by_entropy"][0]["from"] == pytest.approx(wanted["entropy"].min(), abs=2 * ROW_ERROR)


def test_a_sparse_head_gives_lower_bounds(cache: Path, teacher: Path, student: Path) -> None:
    found = evaluate(EvalRequest(directory=student))["cache"]  # the training's cache and its held-out samples
    reader = CacheReader.open(cache)
    held_out = split_samples(reader.sample_ids, 0.25).held_out
    wanted = reference(student, teacher, reader, held_out)
    assert found["exactness"] == {"kl": "lower bound", "reverse_kl": "lower bound"}
    assert (found["samples"], found["manifest"]) == (len(held_out), reader.manifest_digest)
    for name in ("kl", "reverse_kl"):
        assert 0 < found["student"][name] <= wanted[name].mean()
    assert found["student"]["ce"] == pytest.approx(wanted["ce"].mean(), rel=1e-4)
    last = json.loads((student / "summary.json").read_text())["last_eval"]
    for name in ("kl", "kl_se", "ce", "perplexity", "top1_agreement"):
        assert found["student"][name] == pytest.approx(last[f"eval_{name}"], rel=1e-4), name


def test_a_student_that_is_the_teacher(full_store: Path, teacher: Path, tmp_path: Path) -> None:
    same = Path(shutil.copytree(teacher, tmp_path / "same"))
    found = evaluate(
        EvalRequest(directory=same, cache=CacheOptions(str(full_store), all_samples=True), limit=3)
    )["cache"]
    assert found["samples"] == 3
    assert found["student"]["kl"] == pytest.approx(0, abs=1e-6)
    assert found["student"]["reverse_kl"] == pytest.approx(0, abs=1e-6)
    assert found["student"]["top1_agreement"] == 1.0


def test_ternary_students(cache: Path, students: Students, tmp_path: Path) -> None:
    student = Path(shutil.copytree(students("llama", hidden_size=64), tmp_path / "ternary"))
    found = evaluate(EvalRequest(directory=student, cache=CacheOptions(str(cache), fraction=0.25)))["cache"]
    assert found["student"]["kl"] > 0.1


def test_the_command_prints_and_writes_the_same(distily: Run, student: Path, cache: Path) -> None:
    code, out, err = distily("eval", student, "--cache", cache, "--json")
    assert code == 0, err
    record = json.loads(out)
    assert record == json.loads((student / "eval.json").read_text())
    assert record["cache"]["command"][:3] == ["distily-train", "eval", str(student)]
    code, out, err = distily("eval", student, "--limit", 2)
    assert code == 0, err
    assert "top-1 agreement" in out and "lower bound" in out


def test_bad_requests(refused: Refused, student: Path, teacher: Path, cache: Path, tmp_path: Path) -> None:
    assert "config.json" in refused("eval", tmp_path / "nothing")
    assert "summary.json" in refused("eval", teacher)
    assert "--limit" in refused("eval", student, "--limit", 0)
    assert "--all-samples" in refused("eval", student, "--eval-fraction", 1.5)
    assert "--all-samples" in refused("eval", student, "--eval-fraction", 0.5, "--all-samples")
    assert "no/such" in refused("eval", student, "--cache", "no/such")
    assert "--text, --tasks" in refused("eval", student, "--teacher", teacher)
    assert "--tasks" in refused("eval", student, "--task-data", tmp_path)
    assert "did you mean seed?" in refused("eval", student, "--suite", "sed")
    other = teachers.llama(tmp_path / "other", vocab_size=150)
    shutil.copy(teachers.llama(tmp_path / "more", vocab_size=200) / "tokenizer.json", other)
    assert "its tokenizer 200" in refused("eval", other, "--cache", cache, "--all-samples")
    path = student / "summary.json"
    summary = json.loads(path.read_text())
    path.write_text(json.dumps(summary | {"eval_fraction": 0}))
    assert "--all-samples" in refused("eval", student)
    path.write_text(json.dumps(summary | {"cache": "gone/away"}))
    assert "gone/away" in refused("eval", student)
    assert not (student / "eval.json").exists()


def test_other_defaults_are_left_alone() -> None:
    """A cache is measured where it is asked for, and where nothing is."""
    request = EvalRequest(directory=Path("x"))
    assert request.wants_cache
    assert not replace(request, suites=("seed",)).wants_cache
    assert replace(request, suites=("seed",), cache=CacheOptions("store")).wants_cache
