"""A start that is worse than a guess: some copies of a teacher's layers are, and no loss curve says so."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerCallback

# Cross-entropy and KL(teacher || student) of a uniform student are at most log V, whatever the teacher; the
# logged KL is at most the full one (a bound, or in expectation). So no student is called worse that is not.
_MEASURED = ("eval_kl", "eval_ce", "loss_ce")
# Random logits of a small spread s cost s^2 / 2 nats more than equal ones, which is no fault.
_MARGIN = 0.1


def worse_than_uniform(log: Sequence[Mapping[str, Any]], vocab_size: int, start: str | None) -> str | None:
    """A sentence where the first figures of a log are clearly worse than those of a student that gives every
    token the same probability; None where they are not, or where nothing was measured.

    log: Trainer's, oldest first. start: which teacher layers the student is a copy of, None for no copy.
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
    return (
        f"{line}; it is a copy of the teacher's layers {start}, which do not fit together; try --copy-layers "
        "first, another list, or --init random"
    )


class UniformGuess(TrainerCallback):  # type: ignore[misc]
    """Says so on standard error, at the first figures of a training."""

    def __init__(self, vocab_size: int, start: str | None) -> None:
        self._vocab_size, self._start, self._done = vocab_size, start, False

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer has added the entry to the log already."""
        if self._done or not any(name in entry for entry in state.log_history for name in _MEASURED):
            return
        self._done = True
        line = worse_than_uniform(state.log_history, self._vocab_size, self._start)
        if line is not None and state.is_world_process_zero:
            sys.stderr.write(f"\ndistily-train: {line}\n")  # the first: behind a progress bar
