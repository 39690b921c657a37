"""Which samples are held out: a pure function of the sample id, so that a growing cache never moves one
across.
"""

from __future__ import annotations

from collections.abc import Sequence

from student.errors import UserError

_HASH_DIGITS = 16
_HASH_RANGE: int = 16**_HASH_DIGITS


def is_held_out(sample_id: str, fraction: float) -> bool:
    """Whether the sample belongs to the held-out side; `sample_id` is a hex hash, uniform by construction."""
    return int(sample_id[:_HASH_DIGITS], 16) < fraction * _HASH_RANGE


def split_samples(sample_ids: Sequence[str], fraction: float) -> tuple[list[int], list[int]]:
    """Indices of (training, held-out) samples in the given order; fraction 0 holds nothing out.

    UserError when a side that must not be empty is.
    """
    held_out = [index for index, sample_id in enumerate(sample_ids) if is_held_out(sample_id, fraction)]
    chosen = set(held_out)
    training = [index for index in range(len(sample_ids)) if index not in chosen]
    if not training or (fraction > 0 and not held_out):
        side = "training" if not training else "held-out"
        raise UserError(
            f"--eval-fraction {fraction:g} leaves no {side} sample of the {len(sample_ids)} in this cache; "
            "choose another fraction, or extend the cache with `distily-cache generate --num-samples`"
        )
    return training, held_out
