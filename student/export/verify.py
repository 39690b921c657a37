"""Does what was written compute what the reference computes?

Shape letters: B probes, T positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from student.errors import StudentError

PROBES, POSITIONS = 4, 32
TOLERANCE = 1e-5  # of float32 sums in another order; readers that follow the reference are at 0


@dataclass(frozen=True)
class Agreement:
    """How two models' logits agree on the probes.

    relative_error: norm of the difference over the norm of the reference, logits centred per position (a
    shift of all logits of a position means nothing). top1_agreement: share of positions with the same best
    token.
    """

    positions: int
    relative_error: float
    top1_agreement: float


def probes(config: Any) -> Tensor:
    """Token ids [B, T], the same for every run."""
    text = config.get_text_config()
    length = min(POSITIONS, getattr(text, "max_position_embeddings", POSITIONS))
    generator = torch.Generator().manual_seed(0)
    return torch.randint(text.vocab_size, (PROBES, length), generator=generator)


@torch.no_grad()
def logits_of(model: Any, ids_BT: Tensor) -> Tensor:
    """Logits [B, T, V] in float32.

    transformers' own BitNet layers run uncompiled: compiling them takes longer than all the probes.
    """
    with torch.compiler.set_stance("force_eager"):
        logits: Tensor = model(input_ids=ids_BT.to(model.device), use_cache=False).logits
    return logits.float().cpu()


def compare(logits_BTV: Tensor, reference_BTV: Tensor) -> Agreement:
    """Agreement of `logits_BTV` with `reference_BTV`, in float64."""
    wanted = reference_BTV.double()
    difference = logits_BTV.double() - wanted
    centred = [one - one.mean(-1, keepdim=True) for one in (difference, wanted)]
    same = logits_BTV.argmax(-1) == reference_BTV.argmax(-1)
    error = float(centred[0].norm() / centred[1].norm())
    return Agreement(same.numel(), error, float(same.double().mean()))


def require(agreement: Agreement, reader: str, tolerance: float = TOLERANCE) -> None:
    """StudentError unless the agreement is within the tolerance (also for NaN)."""
    if not agreement.relative_error <= tolerance:
        raise StudentError(
            f"the export, read back by {reader}, is not the student: logits differ by "
            f"{agreement.relative_error:.2g} of their norm (allowed {tolerance:g}), the best token agrees at "
            f"{agreement.top1_agreement:.0%} of the positions; nothing was written"
        )
