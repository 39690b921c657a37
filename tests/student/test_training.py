"""Whole trainings on a real cache through the command line's own functions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.bitnet import WeightQuant

from featurestore.reader import CacheReader
from student import bitnet
from student.config.flags import StudentOptions
from student.modeling.plan import plan_student
from tests import html
from tests.student.caches import random_samples, write_cache
from tests.student.conftest import SPECS

Train = Callable[..., dict[str, Any]]
TWO_LAYERS = ("--student-model-config", '{"num_hidden_layers": 2}')
BITNET = (*TWO_LAYERS, "--student-model-as-bitnet")


def weights(directory: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(directory / "model.safetensors")
    return tensors


def logs(directory: Path) -> list[dict[str, Any]]:
    history: list[dict[str, Any]] = json.loads((directory / "trainer_state.json").read_text())["log_history"]
    return history


def test_a_bitnet_student_learns_and_is_reported(train: Train, tmp_path: Path) -> None:
    hidden = ("--hidden-loss", "cosine", "--layer-map", "1:1,3:2", "--hidden-weight", 0.2)
    steps = ("--max_steps", 60, "--learning-rate", "1e-2", "--per-device-train-batch-size", 8)
    summary = train(tmp_path, *BITNET, *hidden, *steps, "--ce-weight", 0.05)
    first, last = summary["first_eval"], summary["last_eval"]
    assert (first["step"], last["step"]) == (0, 60)
    assert last["eval_kl"] < 0.65 * first["eval_kl"]
    assert last["eval_teacher_perplexity"] == first["eval_teacher_perplexity"] > 1
    assert summary["train_samples"] + summary["held_out_samples"] == 36
    assert summary["sizes"]["ternary_parameters"] == 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
    assert summary["tokens"] > 0
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    entry = next(log for log in logs(tmp_path) if "loss" in log)
    terms = ["kl", "ce", "hidden_cosine_L1_to_L1", "hidden_cosine_L3_to_L2"]
    total = sum(
        weight * entry[f"loss_{name}"] for weight, name in zip([1, 0.05, 0.1, 0.1], terms, strict=True)
    )
    assert entry["loss"] == pytest.approx(total, rel=1e-5)
    assert any(log.get("bitnet_flip_rate", 0) > 0 for log in logs(tmp_path))
    charts = {
        title.split(":")[0] for title in html.page((tmp_path / "report.html").read_text()).texts["title"]
    }
    assert {"KL(teacher ‖ student)", "Perplexity", "Training loss", "Ternary weights that are zero"} <= charts


def test_the_saved_bitnet_student_computes_the_same_in_transformers(
    train: Train, tmp_path: Path, cache: Path, eager: None
) -> None:
    train(tmp_path, *BITNET, "--max_steps", 3)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    kinds = [type(module).__name__ for module in theirs.modules()]
    assert kinds.count("AutoBitLinear") == 14
    own = plan_student(StudentOptions(student=str(tmp_path)), CacheReader.open(cache)).build()[0].eval()
    assert len(list(bitnet.bit_linears(own))) == 14
    passed: dict[str, tuple[Tensor, Tensor]] = {}
    for name, layer in own.named_modules():
        if isinstance(layer, bitnet.BitLinear):
            layer.register_forward_hook(
                lambda _, given, out, name=name: passed.update({name: (given[0], out)})
            )
    ids = torch.arange(3, 17)[None]
    with torch.no_grad():
        ours, reference = own(ids).logits, theirs(ids).logits
        # Of the same input, a layer computes the same but for the rounding of its sum and four factors.
        assert len(passed) == 14
        for name, (x, y) in passed.items():
            layer = theirs.get_submodule(name)
            sizes = x.abs() @ WeightQuant.apply(layer.weight).abs().T
            eps = (x.shape[-1] + 4) * torch.finfo(torch.float32).eps
            assert ((layer(x) - y).abs() <= eps * sizes).all(), name
    # Behind one another, such a difference may move an activation by one of its 127 steps.
    assert (ours - reference).norm() <= 1e-2 * reference.norm()
    assert AutoTokenizer.from_pretrained(tmp_path)("the teacher")["input_ids"] == [3, 4]


def test_resuming_continues_bit_for_bit(train: Train, tmp_path: Path) -> None:
    arguments = (*BITNET, "--max_steps", 6, "--save_steps", 3, "--save_total_limit", 5)
    train(tmp_path / "straight", *arguments)
    resumed = ("--resume_from_checkpoint", tmp_path / "straight" / "checkpoint-3")
    train(tmp_path / "resumed", *arguments, *resumed)
    straight, again = weights(tmp_path / "straight"), weights(tmp_path / "resumed")
    assert straight.keys() == again.keys()
    for name, tensor in straight.items():
        assert torch.equal(tensor, again[name]), name
    halfway = weights(tmp_path / "straight" / "checkpoint-3")
    assert any(not torch.equal(halfway[name], straight[name]) for name in straight)
    losses = [
        [log["loss"] for log in logs(tmp_path / run) if "loss" in log] for run in ("straight", "resumed")
    ]
    assert losses[0] == losses[1]


# The worst is called the best, so that it is not the last one.
BEST = (
    "--load_best_model_at_end",
    "True",
    "--metric_for_best_model",
    "eval_kl",
    "--greater_is_better",
    "True",
)


@pytest.mark.parametrize("best", [(), BEST], ids=["last", "best"])
def test_a_run_that_was_killed_after_its_last_checkpoint_takes_no_step_more(
    train: Train, tmp_path: Path, best: tuple[str, ...]
) -> None:
    arguments = (*BITNET, "--max_steps", 4, "--save_steps", 2, "--eval_steps", 2, *best)
    train(tmp_path, *arguments)
    before, first = weights(tmp_path), json.loads((tmp_path / "summary.json").read_text())
    train(tmp_path, *arguments, "--resume_from_checkpoint", "True")
    after, again = weights(tmp_path), json.loads((tmp_path / "summary.json").read_text())
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    for what in ("steps", "tokens", "last_eval"):
        assert again[what] == first[what], what


def test_a_run_goes_on_where_the_cache_was(
    train: Train,
    tmp_path: Path,
    cache: Path,
    teacher: Path,
    distily_train: Callable[..., tuple[int, str, str]],
) -> None:
    """Samples that came later change neither what a resumed run reads nor in which order."""
    grown = tmp_path / "grown"
    shutil.copytree(cache, grown)
    arguments = ("--max_steps", 6, "--save_steps", 3, *BITNET)
    train(tmp_path / "straight", *arguments)
    old = CacheReader.open(grown).manifest_digest
    write_cache(grown, teacher, random_samples(50, 199), SPECS)
    assert CacheReader.open(grown).manifest_digest != old
    checkpoint = tmp_path / "straight" / "checkpoint-3"
    quick = ("--per-device-train-batch-size", 4, "--eval-fraction", 0.25, "--report-to", "none")
    command = (
        grown,
        "--output-dir",
        tmp_path / "on",
        *quick,
        *arguments,
        "--resume_from_checkpoint",
        checkpoint,
    )
    code, _, err = distily_train(*command)
    assert code == 0, err
    straight, again = weights(tmp_path / "straight"), weights(tmp_path / "on")
    assert all(torch.equal(tensor, again[name]) for name, tensor in straight.items())
    command = (grown, "--output-dir", tmp_path / "not", *command[3:])
    code, _, err = distily_train(*command, "--manifest", "0" * 32)
    assert code == 2 and "--manifest" in err and old in err


def test_accumulated_gradients_are_those_of_one_large_batch(train: Train, tmp_path: Path) -> None:
    """Samples have different numbers of learned positions, so a mean of means would differ."""
    step = (*TWO_LAYERS, "--max_steps", 1, "--optim", "sgd", "--learning-rate", 1, "--warmup_steps", 0)
    step += ("--max_grad_norm", 0)
    train(tmp_path / "one", *step, "--per-device-train-batch-size", 8)
    train(
        tmp_path / "four",
        *step,
        *("--per-device-train-batch-size", 2, "--gradient-accumulation-steps", 4),
    )
    one, four = weights(tmp_path / "one"), weights(tmp_path / "four")
    for name, tensor in one.items():
        torch.testing.assert_close(four[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
    entries = [next(log for log in logs(tmp_path / run) if "loss" in log) for run in ("one", "four")]
    for name in ("loss", "loss_kl"):
        assert entries[0][name] == pytest.approx(entries[1][name], rel=1e-5)


@pytest.mark.parametrize(
    "objective",
    [
        ("--logits-loss", "cakld"),
        ("--logits-loss", "none", "--ce-weight", 1),
        ("--logits-loss", "none", "--hidden-loss", "mse", "--hidden-layers", 3),
    ],
)
def test_other_objectives_still_measure_the_held_out_kl(
    train: Train, tmp_path: Path, objective: tuple[object, ...]
) -> None:
    summary = train(tmp_path, *TWO_LAYERS, *objective, "--max_steps", 2, "--bf16")
    assert summary["last_eval"]["eval_kl"] > 0
    assert "kl" not in summary["objective"]


def test_nothing_held_out_and_explicit_flags_win(train: Train, tmp_path: Path) -> None:
    arguments = ("--eval-fraction", 0, "--save_strategy", "no", "--logging_steps", 2)
    arguments += ("--gradient_checkpointing", "--report_to", "tensorboard", "--freeze-embeddings")
    summary = train(tmp_path, *TWO_LAYERS, *arguments, "--max_steps", 4)
    assert summary["train_samples"] == 36
    assert summary["first_eval"] is None
    assert not list(tmp_path.glob("checkpoint-*"))
    assert [log["step"] for log in logs(tmp_path) if "loss" in log] == [1, 2, 4]
    assert list(tmp_path.rglob("events.out.tfevents*"))


def test_the_best_checkpoint_can_be_loaded_at_the_end(train: Train, tmp_path: Path) -> None:
    best = (
        "--load_best_model_at_end",
        "--metric_for_best_model",
        "eval_kl",
        "--eval_steps",
        2,
        "--save_steps",
        2,
    )
    # At this learning rate the student is ruined by the last step.
    train(tmp_path, *TWO_LAYERS, *best, "--max_steps", 6, "--learning-rate", 3, "--warmup_steps", 0.9)
    history = {log["step"]: log["eval_kl"] for log in logs(tmp_path) if "eval_kl" in log}
    chosen = min((step for step in history if step), key=lambda step: history[step])
    kept = weights(tmp_path / f"checkpoint-{chosen}")
    assert chosen != 6
    for name, tensor in weights(tmp_path).items():
        assert torch.equal(tensor, kept[name]), name
