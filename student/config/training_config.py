"""The configuration of a training in Python: what `from-cache` takes as flags, as transformers' arguments."""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers import TrainingArguments

from student.config import sharding
from student.config.flag_checks import check_flags
from student.config.flagfile import word
from student.config.flags import StudentOptions
from student.config.precision import settle, uses_cpu

# Runs of fewer steps are evaluated every so many, others ten times.
_SHORT_RUN, _SHORT_RUN_EVAL_STEPS = 50, 5
# Metrics that fall as a student gets better; Trainer assumes so for losses only.
_FALLING = ("kl", "ce", "perplexity", "bits_per_byte")
_AS_TEXT = (
    "student_model_config",
    "objective",
    "hidden_layers",
    "layer_map",
    "copy_layers",
    "teacher_weights",
    "select",
)


def _report_to() -> str:
    return "tensorboard" if importlib.util.find_spec("tensorboard") else "none"


@dataclass(repr=False)
class DistillationConfig(StudentOptions, TrainingArguments):  # type: ignore[misc]
    """transformers' `TrainingArguments`, and what is distilled: each flag of `distily-train from-cache`, with
    underscores.

    Defaults that differ from those of `TrainingArguments` stand below. A field that is None is filled in from
    the machine and from the other arguments.

    `student_model_config` and `objective` may be mappings. `objective` takes the place of `logits_loss`,
    `ce_weight`, `hidden_loss` and their kin.

    Attributes:
        notes: what was chosen for the user, in sentences.
        sharded: whether the processes share the student's weights (`fsdp=True`).

    Raises:
        UserError: a value that cannot be served; the message names the flag.

    Example:
        DistillationConfig(output_dir="out", logits_loss="kl", ce_weight=0.1, max_steps=100)
    """

    eval_strategy: Any = "steps"
    """Held-out samples are measured during the run, not only at its end."""
    eval_on_start: bool = True
    """They are also measured before the first step, which shows where the student starts."""
    eval_steps: float | None = None
    """A share of the run, or a number of steps from 1 up. None: a tenth of the run, but every 5 steps where
    `max_steps` is below 50 and `load_best_model_at_end` is off."""
    logging_steps: float = 0.02
    """A share of the run: the curve has about fifty points, however long the run is."""
    logging_first_step: bool = True
    """The loss of the first step is logged as well: it is that of the student as it starts."""
    save_steps: float = 0.2
    """A share of the run: five checkpoints over its length."""
    save_total_limit: int | None = 2
    """The last two checkpoints are kept and older ones removed, except the best one with
    `load_best_model_at_end`."""
    learning_rate: float = 4e-4
    """Eight times that of `TrainingArguments`. `distily-train sweep` compares several."""
    lr_scheduler_type: Any = "cosine"
    """The learning rate falls as a cosine, to zero at the last step."""
    warmup_steps: float = 0.05
    """A share of the run, in which the learning rate rises linearly from zero."""
    report_to: Any = field(default_factory=_report_to)
    """TensorBoard where it is installed, else nothing."""
    logging_nan_inf_filter: bool = False
    """A loss that is not finite ends the training when it is logged; to look at that of each step is to wait
    for a GPU."""
    include_num_input_tokens_seen: Any = "non_padding"
    """Tokens are counted for the summary, without padding."""
    remove_unused_columns: bool = False
    """A cache has no columns to remove."""
    use_cpu: bool | None = None
    """None: the GPU that torch sees, or the CPU of a machine without one."""
    bf16: bool | None = None
    """None: bfloat16 autocast is on where the machine computes fast in it; `notes` says what was chosen."""
    dataloader_num_workers: int | None = None
    """None: for a training on a GPU up to 4, no more than the CPU has cores; on a CPU 0."""
    dataloader_pin_memory: bool | None = None
    """None: on for a training on a GPU."""

    def __post_init__(self) -> None:
        for name in _AS_TEXT:
            given = getattr(self, name)
            if given is not None:
                setattr(self, name, word(given, name))
        complete(self)
        super().__post_init__()
        self.check()
        self.notes = (*settle(self, self.bf16), *sharding.settle(self, self.sharded))


def defaults() -> dict[str, Any]:
    """The defaults that differ from those of TrainingArguments."""
    theirs = {each.name: each.default for each in fields(TrainingArguments)}
    ours = {each.name: each for each in fields(DistillationConfig)}
    changed = {name: ours[name].default for name in theirs if ours[name].default != theirs[name]}
    return changed | {"report_to": _report_to()}


def complete(arguments: Any) -> None:
    """Check what was given, and put what was left out in its place, before TrainingArguments are made of it.

    arguments: an object with our options and the fields of TrainingArguments as attributes.
    """
    check_flags(arguments)
    sharding.take_over(arguments)
    arguments.use_cpu = uses_cpu(arguments.use_cpu)
    on_gpu = not arguments.use_cpu and torch.cuda.is_available()
    if arguments.dataloader_num_workers is None:
        arguments.dataloader_num_workers = min(4, os.cpu_count() or 1) if on_gpu else 0
    if arguments.dataloader_pin_memory is None:
        arguments.dataloader_pin_memory = on_gpu
    if arguments.disable_tqdm is None:
        arguments.disable_tqdm = not sys.stderr.isatty()
    if arguments.eval_steps is None:
        # A tenth of a short run is a step or two, and an evaluation may cost as much as several. Trainer
        # wants both intervals as shares of the run where it is to find the best of the saved models.
        short = 0 < arguments.max_steps < _SHORT_RUN and not arguments.load_best_model_at_end
        arguments.eval_steps = _SHORT_RUN_EVAL_STEPS if short else 0.1
    metric = (arguments.metric_for_best_model or "").removeprefix("eval_")
    if arguments.greater_is_better is None and metric in _FALLING:
        arguments.greater_is_better = False
