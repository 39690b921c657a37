"""A start that is worse than a guess: some copies of a teacher's layers are, and no loss curve says so."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import TrainerCallback

from distily.logs import LOG
from student.modeling.plan import StudentPlan

# Cross-entropy and KL(teacher || student) of a uniform student are at most log V, whatever the teacher; the
# logged KL is at most the full one (a bound, or in expectation). So no student is called worse that is not.
_MEASURED = ("eval_kl", "eval_ce", "loss_ce")
# Random logits of a small spread s cost s^2 / 2 nats more than equal ones, which is no fault.
_MARGIN = 0.1


def worse_than_uniform(
    log: Sequence[Mapping[str, Any]], vocab_size: int, start: str | None, rounded: bool = False
) -> str | None:
    """A sentence where the first figures of a log are clearly worse than those of a student that gives every
    token the same probability; None where they are not, or where nothing was measured.

    log: Trainer's, oldest first. start: which teacher layers the student is a copy of, None for no copy.
    rounded: whether the conversion to ternary weights came before the figures.
    """
    guess = math.log(vocab_size)
    entry = next((entry for entry in log if any(name in entry for name in _MEASURED)), {})
    bad = next((name for name in _MEASURED if entry.get(name, 0.0) > (1 + _MARGIN) * guess), None)
    if bad is None:
        return None
    what = "KL" if bad == "eval_kl" else "cross-entropy"
    line = (
        f"the student starts worse than a uniform guess: {what} {entry[bad]:.3g} nats, where a guess has at "
        f"most {guess:.3g}"
    )
    if start is None:
        return line
    if rounded:
        return f"{line}; rounding a teacher's weights to ternary does that, and the training is to undo it"
    return (
        f"{line}; it is a copy of the teacher's layers {start}, which do not fit together; try --copy-layers "
        "first, another list, or --init random"
    )


def best_copy(
    plan: StudentPlan, samples: Sequence[Tensor], device: torch.device | str
) -> tuple[StudentPlan, str | None]:
    """The plan itself, unless it leaves the choice of layers open and its student starts worse than a uniform
    guess; then the one of it and its alternatives that starts with the lowest cross-entropy, and a sentence
    that says so.

    samples: token ids, int64 [T] each. Of several students one is in memory at a time, and none stays.
    """
    samples = [tokens for tokens in samples if len(tokens) > 1]
    if not plan.alternatives or not samples:
        return plan, None
    loss, guess = _start_loss(plan, samples, device), math.log(plan.config.vocab_size)
    if loss <= (1 + _MARGIN) * guess:
        return plan, None
    losses = [_start_loss(other, samples, device) for other in plan.alternatives]
    best = min(range(len(losses)), key=losses.__getitem__)
    if losses[best] >= loss:
        return plan, None
    chosen = plan.alternatives[best]
    return chosen, (
        f"--copy-layers auto: a copy of teacher layers {plan.copied} starts at {loss:.3g} nats a token, "
        f"worse than a uniform guess ({guess:.3g}); layers {chosen.copied} are copied, which start at "
        f"{losses[best]:.3g}"
    )


@torch.no_grad()
def _start_loss(plan: StudentPlan, samples: Sequence[Tensor], device: torch.device | str) -> float:
    """Cross-entropy in nats per token of the student before any conversion; infinite for NaN."""
    student, total, count = plan.start().to(device).eval(), 0.0, 0
    for tokens in samples:
        logits_TV = student(input_ids=tokens[None].to(device)).logits[0, :-1].float()
        total += float(cross_entropy(logits_TV, tokens[1:].to(device), reduction="sum"))
        count += len(tokens) - 1
    return total / count if math.isfinite(total) else math.inf


class UniformGuess(TrainerCallback):  # type: ignore[misc]
    """Says so at the first figures of a training; as a warning, unless it is as expected."""

    def __init__(self, vocab_size: int, start: str | None, rounded: bool) -> None:
        self._vocab_size, self._start, self._rounded, self._done = vocab_size, start, rounded, False

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer has added the entry to the log already."""
        if self._done or not any(name in entry for entry in state.log_history for name in _MEASURED):
            return
        self._done = True
        line = worse_than_uniform(state.log_history, self._vocab_size, self._start, self._rounded)
        if line is not None and state.is_world_process_zero:
            (LOG.info if self._rounded else LOG.warning)(line)
