"""How quantisation is blended in: strengths that rise with the steps of a run."""

from __future__ import annotations

from dataclasses import dataclass

from student.bitnet.linear import Strengths


@dataclass(frozen=True)
class Warmup:
    """Shares of all steps in which the strengths rise linearly from 0 to 1; with 0 there is no rise.

    The strengths are a function of the step alone, so a resumed run has those of one that ran through.
    """

    weights: float = 0.0
    activations: float = 0.0
    norms: float = 0.0

    def at(self, step: int, max_steps: int) -> Strengths:
        """Strengths for the step that follows `step` finished ones."""
        done = step / max(max_steps, 1)
        shares = (self.weights, self.activations, self.norms)
        return Strengths(*(1.0 if share <= done else done / share for share in shares))
