"""A training whose numbers are not finite any more ends, instead of saving a student of NaNs.

Trainer by itself continues to its end, and its log hides such losses (--logging_nan_inf_filter).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import distributed, nn

from student.errors import StudentError
from student.shards import over_all, rows

_MENDS = (
    "lower --learning-rate or --max-grad-norm, lengthen --warmup-steps, or train in float32 (without --bf16 "
    "and --fp16); earlier checkpoints are whole, --resume_from_checkpoint True resumes from the last"
)


def check_terms(means: Mapping[str, float], first: int, last: int) -> None:
    """StudentError where the mean of a term, over the steps `first` to `last`, is not finite."""
    wrong = [label for label, mean in means.items() if not math.isfinite(mean)]
    if wrong:
        when = f"step {last}" if first == last else f"steps {first} to {last}"
        raise StudentError(f"{when}: the loss is not finite ({', '.join(wrong)}); {_MENDS}")


def check_weights(model: nn.Module, step: int) -> None:
    """StudentError where a parameter is not finite after `step` steps; in all processes that share it."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    wrong = torch.stack([~rows(parameter).values.isfinite().all() for parameter in parameters]).int()
    found = over_all(wrong, parameters[0], distributed.ReduceOp.MAX).nonzero()
    if len(found):
        name = names[int(found[0])]
        raise StudentError(f"step {step}: the weights are not finite ({name}) and are not saved; {_MENDS}")
