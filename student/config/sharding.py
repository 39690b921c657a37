"""`--fsdp`: asked for by the flag or by `accelerate launch --use_fsdp`, and what goes together with it."""

from __future__ import annotations

import os
from argparse import Namespace
from typing import Any

from transformers import TrainingArguments
from transformers.hf_argparser import string_to_bool

from student.errors import UserError

LAUNCHER = "ACCELERATE_USE_FSDP"  # what `accelerate launch --use_fsdp` sets
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")
NOTHING = {"xla": False, "xla_fsdp_v2": False}  # what Trainer asks of --fsdp-config; it then shards nothing
_ON, _OFF = (True, "True", "true", "full_shard"), (None, False, "", "False", "false")
# Of the launcher's variables: the value that is served, and what to do about another.
_SERVED = {
    "FSDP_VERSION": ("2", "FSDP1 is not supported; add --fsdp_version 2"),
    "FSDP_OFFLOAD_PARAMS": ("false", "weights are not moved to the CPU; leave it out"),
    "FSDP_RESHARD_AFTER_FORWARD": (
        "true",
        "layers are always dropped after their forward pass; leave it out",
    ),
    "FSDP_ACTIVATION_CHECKPOINTING": (
        "false",
        "leave it out of accelerate's configuration, and give --gradient-checkpointing to `from-cache`",
    ),
}


def launched(variable: str) -> bool:
    """Whether accelerate's launcher has set one of its switches."""
    return bool(string_to_bool(os.environ.get(variable) or "false"))


def compiles(flags: Namespace | Any) -> bool:
    """Whether `--torch-compile` is asked for, be it by one of its options."""
    return bool(flags.torch_compile or flags.torch_compile_backend or flags.torch_compile_mode)


def check_optimizer(name: str) -> None:
    """UserError for one whose update of a shard is not known to be that of the whole weight."""
    if name not in OPTIMIZERS:
        raise UserError(
            f"--fsdp: --optim {name} is not known to update shards rightly; choose {', '.join(OPTIMIZERS)}"
        )


def take_over(flags: Namespace | Any) -> None:
    """Check a request for FSDP, and keep it from TrainingArguments and Trainer, which would shard in another
    way than `student.training.sharding`. `flags.sharded` says whether there is one.

    Raises:
        UserError: it is asked for in a way, or together with something, that is not served.
    """
    if flags.fsdp not in (*_ON, *_OFF):
        raise UserError(f"--fsdp {flags.fsdp}: it takes no value; give --fsdp alone")
    flags.sharded = flags.fsdp in _ON or launched(LAUNCHER)
    flags.fsdp = flags.fsdp_config = None
    if not flags.sharded:
        return
    if launched(LAUNCHER):
        _check_launcher()
        # Tells transformers that every process loads the student.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    check_optimizer(str(getattr(flags.optim, "value", flags.optim)))
    if compiles(flags):
        raise UserError("--fsdp: --torch-compile is not known to work with it; leave one of them out")
    if flags.fp16:
        raise UserError("--fsdp: --fp16 is not supported together with it; use --bf16")
    if flags.auto_find_batch_size:
        raise UserError(
            "--fsdp: --auto-find-batch-size is not supported together with it; give "
            "--per-device-train-batch-size"
        )


def _check_launcher() -> None:
    for variable, (served, mend) in _SERVED.items():
        value = os.environ.get(variable, "1" if variable == "FSDP_VERSION" else served)
        if value.lower() != served:
            raise UserError(f"accelerate launch --{variable.lower()} {value}: {mend}")


def settle(args: TrainingArguments, sharded: bool) -> list[str]:
    """Note in `args.fsdp` whether the student is sharded; what to tell the user.

    Raises:
        UserError: there is only one process.
    """
    if not sharded:
        return []
    if args.world_size < 2:
        raise UserError(
            "--fsdp shards the student over processes, and this is the only one; start several with "
            "`accelerate launch --multi_gpu --num_processes N -m student.cli from-cache ...`"
        )
    args.fsdp, args.fsdp_config = True, dict(NOTHING)
    return [
        f"each of {args.world_size} processes holds a part of the weights, gradients and optimizer state "
        "(FSDP2); checkpoints hold the whole student"
    ]
