"""What a planned `generate` would cost, before anything is spent."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from featurestore.schema import GroupSpec, LogitsSpec
from pipeline.generate import Prepared

_HIDDEN_BYTES = {"bf16": 2, "f32": 4, "int8": 1, "fp8": 1}
# Per position: top logit, lse, label logprob, entropy in float32 and the head size.
_ROW_BYTES = 17
# Ids barely compress; a coded logit takes about half a byte (docs/FORMAT.md).
_LOGIT_BYTES = 0.5


@dataclass(frozen=True)
class Forecast:
    """Sizes of the work that is left; `bytes_to_write` is an upper bound where heads are adaptive."""

    samples: int
    duplicates: int
    tokens: int
    tokens_to_do: int
    shards_to_do: int
    groups_to_do: tuple[str, ...]
    bytes_to_write: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def estimate(prepared: Prepared) -> Forecast:
    """Sum the rows that each missing column group needs."""
    plan, teacher = prepared.plan, prepared.teacher
    size, kinds = 0.0, set()
    for work in plan.work:
        for group in work.groups:
            kinds.add(group.kind)
            size += work.task.rows * row_bytes(group, teacher.vocab_size, teacher.hidden_size)
    return Forecast(
        samples=plan.samples_total,
        duplicates=plan.duplicates,
        tokens=plan.rows_total,
        tokens_to_do=plan.rows_to_do,
        shards_to_do=len(plan.work),
        groups_to_do=tuple(sorted(kinds)),
        bytes_to_write=round(size),
    )


def row_bytes(group: GroupSpec, vocab_size: int, hidden_size: int) -> float:
    """About how many bytes one position of `group` takes on disk."""
    if isinstance(group, LogitsSpec):
        return _ROW_BYTES + group.top_k * ((2 if vocab_size <= 65_536 else 4) + _LOGIT_BYTES)
    return hidden_size * _HIDDEN_BYTES[group.dtype] + (4 if group.dtype in ("int8", "fp8") else 0)
