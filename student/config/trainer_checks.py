"""What Trainer would find only once the student is built, or in the middle of a training: refused before."""

from __future__ import annotations

import json
from importlib.util import find_spec

import torch
from torch import nn
from transformers import Trainer, TrainingArguments, get_scheduler

from distily.text import one_line
from student.errors import UserError
from student.objective.terms import Objective

_OWN_GROUPS = {"params", "model", "optimizer_dict"}  # options of optimizers that take no groups
_FOLLOWS_METRIC = ("reduce_lr_on_plateau", "greedy")


def check_needs_evaluation(args: TrainingArguments) -> None:
    """UserError for what follows held-out metrics where nothing is held out."""
    follows = {
        "--load-best-model-at-end": args.load_best_model_at_end,
        "--save-strategy best": args.save_strategy == "best",
        **{f"--lr-scheduler-type {name}": args.lr_scheduler_type == name for name in _FOLLOWS_METRIC},
    }
    for flag, given in follows.items():
        if given:
            raise UserError(f"{flag} needs held-out samples; give an --eval-fraction above 0")


def check_metric(args: TrainingArguments, *, own_tokenizer: bool) -> None:
    """UserError for a metric that only students with the teacher's tokenizer have, or only others."""
    metric = (args.metric_for_best_model or "").removeprefix("eval_")
    lacking = "bits_per_byte" if not own_tokenizer else "teacher_perplexity"
    if metric == lacking:
        whose = "the teacher's" if not own_tokenizer else "one of its own"
        raise UserError(
            f"--metric-for-best-model {metric}: not measured of a student whose tokenizer is {whose}; "
            "take kl or ce"
        )


def check_optimizer(args: TrainingArguments, masters: str, separate: str | None) -> None:
    """Trainer finds a missing library, and values that its optimizers refuse, only when training begins.

    separate: the flag that gives ternary weights a rate or decay of their own, if one does.
    """
    name = str(args.optim.value)
    if masters == "bf16" and name not in ("adamw_torch", "adamw_torch_fused"):
        raise UserError(
            f"--bitnet-masters bf16: --optim {name} would round its updates away, so an AdamW of our own "
            "comes with it; leave --optim out"
        )
    if any(part in name for part in ("8bit", "paged", "bnb")) and not find_spec("bitsandbytes"):
        raise UserError(
            f"--optim {name} needs bitsandbytes; install it (the extra [cuda]) or use --optim adamw_torch"
        )
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
        optimizer = kind([_tensor()], **options) if kind.__module__.startswith("torch.optim") else None
    except ImportError as error:
        raise UserError(
            f"--optim {name} needs a package that is not installed ({one_line(error, None)})"
        ) from error
    except (ValueError, TypeError, KeyError) as error:
        if "pass a model" in str(error):  # which there is not yet
            _check_groups(name, separate)
            return
        raise UserError(
            f"--optim {name} cannot be had with this --learning-rate, --optim-args, --adam-beta1, "
            f"--adam-beta2 and --adam-epsilon: {one_line(error, None)}"
        ) from error
    plain = isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    if not plain or _OWN_GROUPS & set(options):
        _check_groups(name, separate)
    _check_scheduler(args, optimizer or torch.optim.SGD([_tensor()]))


def _check_groups(name: str, separate: str | None) -> None:
    """UserError for rates of their own with an optimizer that makes its groups of weights itself."""
    if separate is not None:
        raise UserError(
            f"{separate}: --optim {name} sorts the weights into groups itself; use adamw_torch, or leave "
            "the flag out"
        )


def _check_scheduler(args: TrainingArguments, optimizer: torch.optim.Optimizer) -> None:
    """UserError for options that the schedule does not take, or lacks."""
    name, options = str(args.lr_scheduler_type.value), args.lr_scheduler_kwargs
    try:
        get_scheduler(name, optimizer, 1, 10, options)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"--lr-scheduler-type {name} cannot be had with --lr-scheduler-kwargs {json.dumps(options)}: "
            f"{one_line(error, None)}"
        ) from error


def _tensor() -> nn.Parameter:
    return nn.Parameter(torch.zeros(1))


def check_schedule(args: TrainingArguments, two_stage: bool) -> None:
    """A second stage multiplies a rate that is a function of the step."""
    name = str(args.lr_scheduler_type.value)
    if two_stage and name in _FOLLOWS_METRIC:
        raise UserError(
            f"--bitnet-two-stage: --lr-scheduler-type {name} follows the loss and not the step; use cosine "
            "or linear"
        )


def check_hub(args: TrainingArguments) -> None:
    """Trainer asks the hub only once the student is built."""
    if not args.push_to_hub:
        return
    from huggingface_hub import whoami

    try:
        whoami(token=args.hub_token)
    except Exception as error:  # the hub's client changed its HTTP library, and with it what it raises
        reason = one_line(error, None).partition(". ")[0]
        raise UserError(
            f"--push-to-hub: the hub does not let us in ({reason}); log in with `hf auth login` or give "
            f"--hub-token, or leave the flag out and upload {args.output_dir} later"
        ) from error


def check_losses(args: TrainingArguments, objective: Objective) -> None:
    """UserError for losses that do not go with how the student is trained."""
    if args.fsdp:
        _check_sharded(objective)
    if objective.balanced:
        _check_checkpointing(args)


def _check_sharded(objective: Objective) -> None:
    """UserError for losses that need a layer's weights outside its own forward and backward pass."""
    term = next((term for term in objective.terms if term.loss.kind == "relation"), None)
    if term is not None:
        raise UserError(
            f"--fsdp: {term.loss.name} computes queries, keys and values from weights of the student that "
            "are not gathered at that time; leave one of them out"
        )
    if objective.balanced:
        raise UserError(
            "--fsdp: balance: gradient_norm measures gradients of weights that are sharded; give the terms "
            "weights instead"
        )


def _check_checkpointing(args: TrainingArguments) -> None:
    """Gradient norms of single terms cannot be had from reentrant checkpoints."""
    given = dict(args.gradient_checkpointing_kwargs or {})
    if args.gradient_checkpointing and given.setdefault("use_reentrant", False):
        raise UserError(
            "--gradient-checkpointing-kwargs: balance: gradient_norm needs use_reentrant false; leave it out"
        )
    args.gradient_checkpointing_kwargs = given
