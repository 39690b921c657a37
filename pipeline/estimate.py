"""What a planned `generate` would cost, before anything is spent."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from featurestore.schema import GroupSpec, LogitsSpec, LseSpec
from pipeline.generate import Prepared

_HIDDEN_BYTES = {"bf16": 2, "f32": 4, "int8": 1, "fp8": 1}
# Per position: head size and mass, lse, label logprob, entropy; measured in benchmarks/store_size.py, as are
# the bytes of a head entry (an id and a coded logit) and of a tail draw.
_ROW_BYTES = 7
_ENTRY_BYTES = 1.9
_DRAW_BYTES = 1.3
_LSE_BYTES = 2.0


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
            size += work.task.rows * row_bytes(group, teacher.hidden_size)
    return Forecast(
        samples=plan.samples_total,
        duplicates=plan.duplicates,
        tokens=plan.rows_total,
        tokens_to_do=plan.rows_to_do,
        shards_to_do=len(plan.work),
        groups_to_do=tuple(sorted(kinds)),
        bytes_to_write=round(size),
    )


def row_bytes(group: GroupSpec, hidden_size: int) -> float:
    """About how many bytes one position of `group` takes on disk."""
    if isinstance(group, LogitsSpec):
        return _ROW_BYTES + group.top_k * _ENTRY_BYTES + group.tail * _DRAW_BYTES
    if isinstance(group, LseSpec):
        return _LSE_BYTES
    return hidden_size * _HIDDEN_BYTES[group.dtype] + (4 if group.dtype in ("int8", "fp8") else 0)
