"""Each field of the installed TrainingArguments is served, or refused in one line before loading."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer, TrainingArguments

from student.config.flag_checks import METRICS, RULES, SERVED
from student.modeling import plan as build
from student.training import trainer

Train = Callable[..., dict[str, Any]]
Run = Callable[..., tuple[int, str, str]]
NAMES = [field.name for field in fields(TrainingArguments) if field.init]
# A value of each flag that is refused, and a word of the reason.
REFUSED = {
    "max_steps": (["0"], "at least 1"),
    "num_train_epochs": (["0"], "more than 0"),
    "label_smoothing_factor": (["0.1"], "smoothed"),
    "train_sampling_strategy": (["group_by_length"], "--pack-rows"),
    "length_column_name": (["size"], "no effect"),
    "label_names": (["labels"], "no effect"),
    "remove_unused_columns": (["True"], "columns"),
    "include_for_metrics": (["inputs"], "metrics"),
    "batch_eval_metrics": ([], "metrics"),
    "prediction_loss_only": ([], "metrics"),
    "eval_do_concat_batches": (["False"], "metrics"),
    "eval_use_gather_object": ([], "metrics"),
    "bf16_full_eval": ([], "--bf16"),
    "fp16_full_eval": ([], "--fp16"),
    "use_liger_kernel": ([], "kernels"),
    "liger_kernel_config": (["rope"], "dict"),
    "use_cache": ([], "keys"),
    "enable_jit_checkpoint": ([], "--save-steps"),
    "do_predict": ([], "distily-train eval"),
    "debug": (["tpu_metrics_debug"], "TPU"),
    "per_device_train_batch_size": (["0"], "1 or more"),
    "per_device_eval_batch_size": (["0"], "1 or more"),
    "gradient_accumulation_steps": (["0"], "1 or more"),
    "optim_target_modules": (["all-linear"], "galore"),
    "metric_for_best_model": (["accuracy"], "top1_agreement"),
    "report_to": (["nobody"], "tensorboard"),
    "trackio_space_id": (["me/space"], "--report-to trackio"),
    "trackio_bucket_id": (["me/bucket"], "--report-to trackio"),
    "trackio_static_space_id": (["me/space"], "--report-to trackio"),
    "accelerator_config": (['{"split_batches": true}'], "order"),
    "parallelism_config": (["x"], "parallelism"),
    "dataloader_persistent_workers": ([], "--dataloader-num-workers"),
    "dataloader_multiprocessing_context": (["spawn"], "--dataloader-num-workers"),
    "dataloader_in_order": (["False"], "order"),
    "fsdp_config": (['{"version": 2}'], "--fsdp alone"),
    "deepspeed": (["ds.json"], "accelerate launch"),
}
# Flags whose effect is said to be Trainer's own, two or three at a time; trained with, on a CPU.
TRAINED = [
    ("--neftune-noise-alpha", "5", "--eval-accumulation-steps", "1", "--torch-empty-cache-steps", "1"),
    ("--debug", "underflow_overflow", "--skip-memory-metrics", "False", "--full-determinism"),
    ("--dataloader-num-workers", "2", "--dataloader-persistent-workers", "--dataloader-prefetch-factor", "2"),
    (
        "--dataloader-num-workers",
        "1",
        "--dataloader-multiprocessing-context",
        "spawn",
        "--eval-fraction",
        "0",
    ),
    ("--gradient-checkpointing", "--max-grad-norm", "0.5", "--optim", "adafactor"),
    ("--optim", "schedule_free_adamw"),
    ("--lr-scheduler-type", "warmup_stable_decay", "--lr-scheduler-kwargs", '{"num_decay_steps": 1}'),
    ("--average-tokens-across-devices", "False", "--include-num-input-tokens-seen", "all"),
    ("--save-only-model", "--restore-callback-states-from-checkpoint", "--logging-nan-inf-filter", "False"),
]
FSDP2 = {"USE_FSDP": "true", "FSDP_VERSION": "2"}  # of accelerate's launcher
SMALL = ("--student-model-config", '{"num_hidden_layers": 1}', "--max-steps", "2")


@pytest.fixture
def refuse(
    distily_train: Run, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """Runs a request in which building the student is an error; the one line on standard error."""

    def built(_plan: build.StudentPlan, *_: object) -> None:
        raise AssertionError("the student was built before the request was checked")

    monkeypatch.setattr(build.StudentPlan, "build", built)

    def run(*arguments: object) -> str:
        code, _, err = distily_train(cache, "--output-dir", tmp_path / "out", *arguments)
        assert (code, len(err.splitlines())) == (2, 1), err
        return err

    return run


def test_every_flag_is_classified() -> None:
    """A flag that a later transformers adds has to be looked at: does it mean here what it means there?"""
    assert set(NAMES) - SERVED - set(RULES) == set()
    assert set(RULES) == set(REFUSED) and not SERVED & set(RULES)


@pytest.mark.parametrize("name", [name for name in NAMES if name in RULES])
def test_what_cannot_be_served_is_refused(refuse: Callable[..., str], name: str) -> None:
    value, word = REFUSED[name]
    flag = f"--{name.replace('_', '-')}"
    line = refuse(flag, *value)
    assert flag in line and word in line


@pytest.mark.parametrize(
    ("launcher", "flags", "reason"),
    [
        ({}, ("--fsdp",), "this is the only one"),
        ({}, ("--fsdp=offload",), "give --fsdp alone"),
        ({}, ("--fsdp", "--fp16"), "use --bf16"),
        ({}, ("--fsdp", "--torch-compile"), "--torch-compile"),
        ({}, ("--fsdp", "--optim", "adafactor"), "choose adamw_torch, "),
        ({}, ("--fsdp", "--auto-find-batch-size"), "--per-device-train-batch-size"),
        ({"USE_FSDP": "true"}, (), "add --fsdp_version 2"),
        (FSDP2, (), "this is the only one"),
        (FSDP2 | {"FSDP_OFFLOAD_PARAMS": "true"}, (), "--fsdp_offload_params"),
        (FSDP2 | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, (), "give --gradient-checkpointing"),
        ({"USE_DEEPSPEED": "true"}, (), "--fsdp, with --multi_gpu"),
        ({"USE_PARALLELISM_CONFIG": "true"}, (), "only data parallelism"),
    ],
)
def test_what_accelerates_launcher_asks_for(
    refuse: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    launcher: dict[str, str],
    flags: tuple[str, ...],
    reason: str,
) -> None:
    for name, value in launcher.items():
        monkeypatch.setenv(f"ACCELERATE_{name}" if name.startswith("USE") else name, value)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    assert reason in refuse(*flags)


@pytest.mark.parametrize("name", ["TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"])
def test_a_compiler_that_the_environment_turns_off(
    refuse: Callable[..., str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Nothing would be compiled, and nobody would say so."""
    monkeypatch.setenv(name, "1")
    for flag in (["--torch-compile"], ["--torch-compile-backend", "eager"]):
        line = refuse(*flag)
        assert "--torch-compile" in line and f"unset {name}" in line


def test_integrations_without_their_package(refuse: Callable[..., str]) -> None:
    for name in ("wandb", "mlflow", "comet_ml", "clearml"):
        line = refuse("--report-to", name)
        assert f"--report-to {name}" in line and "install" in line


@pytest.mark.parametrize(
    "flags",
    [
        ("--optim", "galore_adamw", "--optim-target-modules", "attn"),
        ("--optim", "grokadamw"),
        ("--optim-args", "nonsense"),
        ("--learning-rate", "-1"),
        ("--lr-scheduler-type", "warmup_stable_decay"),
        ("--lr-scheduler-kwargs", '{"nonsense": 1}'),
        ("--eval-fraction", "0", "--load-best-model-at-end"),
        ("--eval-fraction", "0", "--save-strategy", "best", "--metric-for-best-model", "kl"),
        ("--eval-fraction", "0", "--lr-scheduler-type", "reduce_lr_on_plateau"),
    ],
)
def test_what_trainer_would_find_only_in_training(refuse: Callable[..., str], flags: tuple[str, ...]) -> None:
    line = refuse(*flags)
    assert flags[-2] in line or flags[-1] in line or flags[0] in line


@pytest.mark.parametrize("flags", TRAINED, ids=lambda flags: flags[0][2:])
def test_flags_that_are_served_are(train: Train, tmp_path: Path, flags: tuple[str, ...]) -> None:
    if "schedule_free_adamw" in flags:
        pytest.importorskip("schedulefree")
    assert train(tmp_path, *SMALL, *flags)["steps"] == 2


def test_the_batch_size_is_found(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight samples are too many for the memory once; four are not."""
    sizes: list[int] = []
    step = trainer.CacheTrainer.training_step

    def training_step(self: Trainer, model: Any, inputs: dict[str, Any], *args: Any) -> Any:
        sizes.append(len(inputs["labels"]))
        if len(inputs["labels"]) > 4:
            raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")
        return step(self, model, inputs, *args)

    monkeypatch.setattr(trainer.CacheTrainer, "training_step", training_step)
    flags = ("--auto-find-batch-size", "--per-device-train-batch-size", "8")
    assert train(tmp_path, *SMALL, *flags)["steps"] == 2
    assert sizes == [8, 7, 6, 5, 4, 4]


def test_a_checkpoint_without_its_optimizer_is_not_resumed(
    train: Train, distily_train: Run, cache: Path, tmp_path: Path
) -> None:
    """Trainer would resume with moments of zero, without a word."""
    train(tmp_path, *SMALL, "--save-only-model", "--save-steps", "1")
    quick = ("--per-device-train-batch-size", "4", "--eval-fraction", "0.25")
    resumed = ("--resume-from-checkpoint", tmp_path / "checkpoint-1")
    code, _, err = distily_train(cache, "--output-dir", tmp_path, *SMALL, *quick, *resumed)
    assert code == 2 and "--save-only-model" in err


def test_every_metric_can_choose_the_best(train: Train, tmp_path: Path) -> None:
    summary = train(tmp_path, *SMALL)
    assert {name.removeprefix("eval_") for name in summary["last_eval"]} >= {*METRICS} - {"bits_per_byte"}
