"""Every flag of transformers' TrainingArguments: served, or refused in one line before anything is loaded.

A test goes through the fields of the installed TrainingArguments, so that a new one is looked at.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from student.config.sharding import NOTHING, compiles, launched
from student.errors import UserError

# Means over the held-out positions, see `student.training.trainer.held_out_metrics`; speeds make no best
# model.
METRICS = ("loss", "kl", "ce", "perplexity", "top1_agreement", "teacher_perplexity", "bits_per_byte")
# Where the package is not called as the integration is.
_PACKAGES = {"azure_ml": "azureml", "flyte": "flytekit"}

# What Trainer does with them holds for a training from a cache, too.
SERVED = frozenset(
    {
        *(
            "output_dir",
            "resume_from_checkpoint",
            "seed",
            "data_seed",
            "use_cpu",
            "local_rank",
            "do_train",
            "do_eval",
        ),
        *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs"),
        *("warmup_steps", "optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
        *("max_grad_norm", "average_tokens_across_devices", "neftune_noise_alpha", "full_determinism"),
        *("bf16", "fp16", "tf32", "gradient_checkpointing", "gradient_checkpointing_kwargs"),
        *("torch_compile", "torch_compile_backend", "torch_compile_mode"),
        *("torch_empty_cache_steps", "auto_find_batch_size", "skip_memory_metrics"),
        *(
            "logging_strategy",
            "logging_steps",
            "logging_first_step",
            "log_on_each_node",
            "logging_nan_inf_filter",
        ),
        *(
            "include_num_input_tokens_seen",
            "log_level",
            "log_level_replica",
            "disable_tqdm",
            "run_name",
            "project",
        ),
        *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "eval_accumulation_steps"),
        *("save_strategy", "save_steps", "save_on_each_node", "save_total_limit", "save_only_model"),
        *(
            "load_best_model_at_end",
            "greater_is_better",
            "ignore_data_skip",
            "restore_callback_states_from_checkpoint",
        ),
        *("push_to_hub", "hub_token", "hub_strategy", "hub_model_id", "hub_private_repo"),
        *("hub_revision", "hub_always_push"),
        *(
            "dataloader_drop_last",
            "dataloader_num_workers",
            "dataloader_pin_memory",
            "dataloader_prefetch_factor",
        ),
        *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph"),
        *("ddp_backend", "ddp_timeout", "fsdp"),
    }
)


@dataclass(frozen=True)
class Rule:
    """When a flag cannot be served. refused: of its value and all flags; what: the reason and the way out."""

    refused: Callable[[Any, Namespace], bool]
    what: str


def _on(value: Any, _flags: Namespace) -> bool:
    return bool(value)


def _off(value: Any, _flags: Namespace) -> bool:
    return value is False


def _given(value: Any, _flags: Namespace) -> bool:
    return value is not None


def _below_one(value: Any, _flags: Namespace) -> bool:
    return int(value) < 1


def _without_trackio(value: Any, flags: Namespace) -> bool:
    return value is not None and "trackio" not in _words(flags.report_to)


def _without_workers(value: Any, flags: Namespace) -> bool:
    return bool(value) and not flags.dataloader_num_workers


_NO_EFFECT = "has no effect on a training from a cache; leave it out"
_OWN_METRICS = "the held-out metrics are sums of their own that need it as it is; leave it out"
_ONE_PRECISION = "held-out samples are measured in the type of the training; use --bf16 or --fp16 alone"
_LIGER = (
    "its kernels are not applied to students here, whose LM head and loss are fused already; leave it out"
)
_FSDP = "how the student is sharded cannot be configured; give --fsdp alone"
_DEEPSPEED = (
    "DeepSpeed is not supported; --fsdp, with --multi_gpu of `accelerate launch`, shards the student as "
    "ZeRO-3 does"
)
_TRACKIO = "has no effect without --report-to trackio; add that"
_WORKERS = "needs --dataloader-num-workers 1 or more; give that, too"
_COMPILER_OFF = ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE")  # variables that torch reads
_ORDER = "samples are read in the order of the cache, by which a training can be resumed; leave it out"
_AT_LEAST_ONE = "must be 1 or more"

RULES: dict[str, Rule] = {
    "label_smoothing_factor": Rule(
        lambda value, _: value != 0,
        "there is no smoothed loss; the teacher's distribution is learned instead, leave it out",
    ),
    "train_sampling_strategy": Rule(
        lambda value, _: value != "random", f"{_ORDER} (--pack-rows avoids padding)"
    ),
    "length_column_name": Rule(lambda value, _: value != "length", _NO_EFFECT),
    "label_names": Rule(_given, _NO_EFFECT),
    "remove_unused_columns": Rule(_on, "a cache has no columns to remove; leave it out"),
    "include_for_metrics": Rule(_on, _OWN_METRICS),
    "batch_eval_metrics": Rule(_on, _OWN_METRICS),
    "prediction_loss_only": Rule(_on, _OWN_METRICS),
    "eval_do_concat_batches": Rule(_off, _OWN_METRICS),
    "eval_use_gather_object": Rule(_on, _OWN_METRICS),
    "bf16_full_eval": Rule(_on, _ONE_PRECISION),
    "fp16_full_eval": Rule(_on, _ONE_PRECISION),
    "use_liger_kernel": Rule(_on, _LIGER),
    "liger_kernel_config": Rule(_given, _LIGER),
    "use_cache": Rule(_on, "a training needs no keys and values of earlier steps; leave it out"),
    "enable_jit_checkpoint": Rule(
        _on, "a training that is stopped early would be saved as if it had ended; use --save-steps"
    ),
    "do_predict": Rule(_on, "there is no test set; use `distily-train eval`"),
    "debug": Rule(
        lambda value, _: "tpu_metrics_debug" in _words(value), "TPUs are not supported; leave it out"
    ),
    "per_device_train_batch_size": Rule(_below_one, _AT_LEAST_ONE),
    "max_steps": Rule(
        lambda value, _: value == 0 or value < -1, "at least 1 is needed; -1 leaves it to --num-train-epochs"
    ),
    "num_train_epochs": Rule(lambda value, flags: value <= 0 > flags.max_steps, "more than 0 is needed"),
    "per_device_eval_batch_size": Rule(_below_one, _AT_LEAST_ONE),
    "gradient_accumulation_steps": Rule(_below_one, _AT_LEAST_ONE),
    "optim_target_modules": Rule(
        lambda value, flags: (
            value is not None and not any(name in str(flags.optim) for name in ("galore", "apollo"))
        ),
        "is of the optimizers galore and apollo; leave it out, or choose one with --optim",
    ),
    "metric_for_best_model": Rule(
        lambda value, _: value is not None and value.removeprefix("eval_") not in METRICS,
        f"is not measured; choose one of {', '.join(METRICS)}",
    ),
    "report_to": Rule(
        lambda value, _: bool(_unknown(value)),
        f"is unknown; choose none, {', '.join(INTEGRATION_TO_CALLBACK)}",
    ),
    "trackio_space_id": Rule(_without_trackio, _TRACKIO),
    "trackio_bucket_id": Rule(_without_trackio, _TRACKIO),
    "trackio_static_space_id": Rule(_without_trackio, _TRACKIO),
    "accelerator_config": Rule(_given, _ORDER),
    "parallelism_config": Rule(
        lambda value, _: value is not None or launched("ACCELERATE_USE_PARALLELISM_CONFIG"),
        "only data parallelism is supported; use --multi_gpu of `accelerate launch`",
    ),
    "dataloader_persistent_workers": Rule(_without_workers, _WORKERS),
    "dataloader_multiprocessing_context": Rule(_without_workers, _WORKERS),
    "dataloader_in_order": Rule(_off, _ORDER),
    "fsdp_config": Rule(lambda value, _: bool(value) and value != NOTHING, _FSDP),
    "deepspeed": Rule(lambda value, _: bool(value) or launched("ACCELERATE_USE_DEEPSPEED"), _DEEPSPEED),
}


def check_flags(flags: Namespace) -> None:
    """UserError for the first flag whose value cannot be served. flags: as parsed, TrainingArguments are not
    made of them yet.
    """
    for name, rule in RULES.items():
        value = getattr(flags, name, None)
        if hasattr(flags, name) and rule.refused(value, flags):
            shown = (
                ""
                if value in (None, True)
                else f" {value if not isinstance(value, list) else ' '.join(value)}"
            )
            raise UserError(f"--{name.replace('_', '-')}{shown}: {rule.what}")
    _check_compiler(flags)
    _check_packages(flags)


def _check_compiler(flags: Namespace) -> None:
    """Of --torch-compile, which torch would pass over in silence."""
    off = next((name for name in _COMPILER_OFF if os.environ.get(name) == "1"), None)
    if off is not None and compiles(flags):
        raise UserError(f"--torch-compile: {off}=1 turns it off; unset {off}, or leave --torch-compile out")


def _check_packages(flags: Namespace) -> None:
    """Of --report-to; Trainer finds one missing only once the student is built."""
    for name in _words(flags.report_to):
        package = _PACKAGES.get(name, name)
        if (
            name in INTEGRATION_TO_CALLBACK
            and name not in ("kubeflow", "tensorboard")
            and not find_spec(package)
        ):
            raise UserError(
                f"--report-to {name} needs the package {package}; install it, or use tensorboard or none"
            )


def _unknown(report_to: Any) -> list[str]:
    return [word for word in _words(report_to) if word not in ("all", "none", *INTEGRATION_TO_CALLBACK)]


def _words(value: Any) -> list[str]:
    """Of a flag that takes one word or several."""
    words = value if isinstance(value, list) else str(value or "").split()
    return [str(getattr(word, "value", word)) for word in words]
