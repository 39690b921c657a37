"""Weights of several teachers that move in the course of a training: `teachers` of an objective file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from distily import DistillationConfig, DistillationTrainer
from featurestore.format.schema import NO_DRAW, GroupFeatures, GroupSpec, LogitsFeatures, LogitsSpec, Sample
from student.errors import UserError
from student.objective.files import parse_objective
from student.objective.terms import Objective
from student.objective.weights import Weight
from tests.student.caches import random_samples, write_given_cache

Run = Callable[..., tuple[int, str, str]]
SAMPLES = random_samples(24, 199)
STEPS = 4
SMALL = ("--student-model-config", '{"num_hidden_layers": 1}', "--init", "random", "--report-to", "none")
MOVING = [{"schedule": "cosine", "from": 3.0, "to": 0.0, "until": 0.5}, 1.0]


def ranked(sample: Sample, which: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and logits [T, 16] of a teacher, descending, in steps of 1/16 nat; half of the tokens are the other
    teacher's too, with other probabilities.
    """
    rng = np.random.default_rng(int(sample.id[:8], 16))
    tokens = np.stack([rng.permutation(199)[:24] for _ in sample.tokens])
    ids = (tokens[:, :16], tokens[:, :7:-1])[which]
    return ids, np.tile(np.arange(16) / -16.0, (len(ids), 1))


def features(sample: Sample, which: int) -> dict[GroupSpec, GroupFeatures]:
    """All that the teacher knows, which the store keeps exactly."""
    ids, logits = ranked(sample, which)
    count, label = len(ids), np.full(len(ids), -2.0, np.float32)
    label[-1] = np.nan
    return {
        LogitsSpec(16, tail=2): LogitsFeatures(
            counts=np.full(count, 16, np.uint16),
            ids=ids.ravel().astype(np.uint32),
            logits=logits.ravel().astype(np.float32),
            # A hair less than it is, so that the head holds everything.
            lse=np.full(count, math.log(np.exp(logits[0]).sum()) - 1e-5, np.float32),
            label_logprob=label,
            entropy=np.full(count, 2.0, np.float32),
            tail_ids=np.full((count, 2), NO_DRAW, np.int32),
        )
    }


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("stores")
    made = [
        write_given_cache(
            folder / name, teacher, SAMPLES, lambda s, w=which: features(s, w), digest=2 * name * 16
        )
        for which, name in enumerate("ab")
    ]
    return made[0], made[1]


def objective(teachers: Any, *terms: dict[str, Any]) -> tuple[str, str]:
    return "--objective", json.dumps({"terms": terms or [{"loss": "kl"}], "teachers": teachers})


def losses_of(out: Path, name: str = "loss") -> list[float]:
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in log if name in entry]


def kl_by_teacher(student: Path) -> np.ndarray:
    """Mean KL(p_i || q) over the learned positions, float64 [2]."""
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float64).eval()
    total, count = np.zeros(2), 0
    for sample in SAMPLES:
        with torch.no_grad():
            ids_1T = torch.from_numpy(sample.tokens).long()[None]
            log_q_TV = model(input_ids=ids_1T).logits[0].log_softmax(-1).numpy()
        learned_T = np.append(sample.loss_mask[1:], False)
        for which in range(2):
            ids_TK, logits_TK = ranked(sample, which)
            log_p_TK = logits_TK - np.log(np.exp(logits_TK).sum(-1, keepdims=True))
            cross_TK = log_p_TK - np.take_along_axis(log_q_TV, ids_TK, -1)
            total[which] += (np.exp(log_p_TK) * cross_TK).sum(-1)[learned_T].sum()
        count += int(learned_T.sum())
    return total / count


FROZEN = ("--optim", "sgd", "--learning-rate", 0, "--lr-scheduler-type", "constant", "--warmup-steps", 0)
ALL = ("--per-device-train-batch-size", len(SAMPLES), "--max-steps", STEPS, "--logging-steps", 1)


def test_each_step_learns_from_the_mixture_of_its_progress(
    stores: tuple[Path, Path], distily_train: Run, distily: Run, tmp_path: Path
) -> None:
    """Against a dense reference in float64, of a student that stands still; the second half of the training
    and all evaluations have the second teacher alone.
    """
    out = tmp_path / "out"
    flags = ("--output-dir", out, *SMALL, *FROZEN, *ALL, "--eval-fraction", 0, "--json")
    code, printed, err = distily_train(*stores, *flags, *objective(MOVING))
    assert code == 0, err
    kl = kl_by_teacher(out)
    assert abs(kl[0] - kl[1]) > 0.01
    # 3 (1 + cos(2 pi progress)) / 2 to 1 at the start, a quarter, and from the half on.
    expected = [np.dot(np.array([w, 1.0]) / (w + 1), kl) for w in (3.0, 1.5, 0.0, 0.0)]
    # Sums in float32 over positions, and the hair of 1e-5.
    assert losses_of(out) == pytest.approx(expected, abs=1e-4)
    assert losses_of(out, "share_teacher0") == pytest.approx([0.75, 0.6, 0.0, 0.0], abs=1e-15)
    found = json.loads(printed)
    assert [one["schedule"] for one in found["stores"]] == MOVING
    assert [one["weight"] for one in found["stores"]] == [0.0, 1.0]
    assert found["held_out_against"].startswith(
        "held-out metrics compare with the mixture 1 b, that of the end of the training"
    )
    report = (out / "report.html").read_text()
    assert "3→0 (cosine, until 0.5)" in report and "Shares of the teachers" in report
    assert distily("card", out)[0] == 0
    assert "| a | 3→0 (cosine, until 0.5) |" in (out / "README.md").read_text()
    code, printed, err = distily("eval", out, "--all-samples", "--json")
    assert code == 0, err
    measured = json.loads(printed)["cache"]
    assert measured["mixture"] == "1 b"
    assert measured["student"]["kl"] == pytest.approx(kl[1], abs=1e-4)


def test_evaluations_of_a_training_measure_the_mixture_of_its_end(
    stores: tuple[Path, Path], distily_train: Run, tmp_path: Path
) -> None:
    """So a student that stands still has the same KL at its start as at its end, which is that of a training
    with these weights throughout.
    """
    flags = (*SMALL, *FROZEN, *ALL, "--eval-fraction", 0.3, "--eval-steps", 2)
    for name, weights in (
        ("moved", objective([{"schedule": "linear", "from": 0, "to": 3}, 1])),
        ("constant", ("--teacher-weights", "3,1")),
    ):
        code, _, err = distily_train(*stores, "--output-dir", tmp_path / name, *flags, *weights)
        assert code == 0, err
    for metric in ("eval_kl", "eval_loss", "eval_teacher_perplexity"):
        moved, constant = (losses_of(tmp_path / name, metric) for name in ("moved", "constant"))
        assert len(set(moved)) == 1 and moved == constant


def test_a_resumed_run_is_the_same_and_takes_no_other_schedule(
    stores: tuple[Path, Path], distily_train: Run, refused: Callable[..., str], tmp_path: Path
) -> None:
    flags = (*SMALL, "--eval-fraction", 0, "--max-steps", 4, "--save-steps", 2, "--logging-steps", 1)
    resume = ("--resume-from-checkpoint", tmp_path / "out" / "checkpoint-2")
    code, _, err = distily_train(*stores, "--output-dir", tmp_path / "out", *flags, *objective(MOVING))
    assert code == 0, err
    again = (*stores, "--output-dir", tmp_path / "again", *flags, *resume)
    code, _, err = distily_train(*again, *objective(MOVING))
    assert code == 0, err
    for name in ("loss", "share_teacher0"):
        assert losses_of(tmp_path / "again", name) == losses_of(tmp_path / "out", name)
    for name, weight in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(load_file(tmp_path / "again" / "model.safetensors")[name], weight)
    for other in (objective([*MOVING[:1], 2.0]), ("--teacher-weights", "3,1")):
        line = refused("from-cache", *stores, "--output-dir", tmp_path / "no", *flags, *resume, *other)
        assert "cosine 3 to 0 until 0.5,1" in line and "give those of that run" in line
    args = DistillationConfig(
        output_dir=str(tmp_path / "out"),
        student_model_config={"num_hidden_layers": 1},
        init="random",
        teacher_weights=[3.0, 1.0],
        report_to="none",
        max_steps=6,
    )
    with pytest.raises(UserError, match="cosine 3 to 0 until"):
        DistillationTrainer(args=args, train_dataset=stores).train(resume_from_checkpoint=True)


def test_sweeps_and_plans_take_schedules(stores: tuple[Path, Path], distily: Run, tmp_path: Path) -> None:
    files = []
    for name, end in (("half", 0.5), ("none", 0.0)):
        teachers = [{"schedule": "linear", "from": 1.0, "to": end}, 1.0]
        files.append(tmp_path / f"{name}.yaml")
        files[-1].write_text(json.dumps({"terms": [{"loss": "kl"}], "teachers": teachers}))
    base = {"student-model-config": {"num_hidden_layers": 1}, "init": "random", "report-to": "none"}
    spec = tmp_path / "sweep.yaml"
    content = {
        "base": {**base, "max-steps": 1, "eval-fraction": 0.3},
        "grid": {"objective": list(map(str, files))},
    }
    spec.write_text(json.dumps(content))
    code, printed, err = distily("sweep", *stores, spec, "--out", tmp_path / "sweep", "--jobs", 1, "--json")
    assert code == 0, err
    runs = json.loads(printed)["runs"]
    assert {run["state"] for run in runs} == {"finished"}
    assert len({run["metrics"]["eval_kl"] for run in runs}) == 2
    code, _, err = distily("plan", *stores, *SMALL, "--objective", files[0], "--json")
    assert code == 0, err


@pytest.mark.parametrize(
    "teachers, words",
    [
        ([0.7, 0.3], ["none of these weights moves", "--teacher-weights"]),
        ([{"schedule": "linear", "from": 1, "to": 0}], ["list of a weight for each"]),
        ({"a": 1}, ["list of a weight for each"]),
        ([MOVING[0], 0], ["teachers[1] is zero throughout"]),
        ([MOVING[0], {"schedule": "linear", "from": 1, "to": 0}], ["all weights are zero at the end"]),
        ([{"schedule": "linear", "from": 1}, 1], ["teachers[0]", "needs `to`"]),
        ([*MOVING, 1], ["3 weights for 2 STOREs"]),
    ],
)
def test_refusals(
    stores: tuple[Path, Path], refused: Callable[..., str], tmp_path: Path, teachers: Any, words: list[str]
) -> None:
    line = refused("from-cache", *stores, "--output-dir", tmp_path / "no", *SMALL, *objective(teachers))
    assert all(word in line for word in words), line


def test_refusals_of_what_has_no_effect(
    stores: tuple[Path, Path], refused: Callable[..., str], tmp_path: Path
) -> None:
    flags = ("--output-dir", tmp_path / "no", *SMALL)
    line = refused("from-cache", *stores, *flags, *objective(MOVING), "--teacher-weights", "1,1")
    assert "exclude each other" in line
    assert "no effect on one STORE" in refused("from-cache", stores[0], *flags, *objective(MOVING))
    named = objective(MOVING, {"loss": "kl", "teacher": 0})
    assert "no term learns from the mixture" in refused("from-cache", *stores, *flags, *named)


def test_shares_are_the_weights_of_the_progress_divided_by_their_sum() -> None:
    teachers = parse_objective({"terms": [{"loss": "kl"}], "teachers": MOVING}, "x").teachers
    assert teachers == (Weight(3.0, 0.0, "cosine", 0.5), Weight.constant(1.0))
    shares = Objective((), teachers=teachers).shares_at(0.25)
    assert shares == pytest.approx([0.6, 0.4], rel=4 * np.finfo(float).eps)
