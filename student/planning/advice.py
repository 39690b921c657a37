"""Whether a training fits, and the smallest changes that make it fit. Pure but for what it is given."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from student.planning.memory import MemoryPlan, Setting
from student.sweep.capacity import MARGIN

EIGHT_BIT = "adamw_bnb_8bit"
_ADAMW = ("adamw_torch", "adamw_torch_fused")


@dataclass(frozen=True)
class Change:
    """Another setting, what is to be changed for it in flags, and what it takes."""

    setting: Setting
    flags: tuple[str, ...]
    memory: MemoryPlan


def needed(plan: MemoryPlan) -> float:
    """Bytes of a device on which a plan fits: allocators leave gaps between tensors."""
    process = plan.at_peak.get("process", 0)
    return MARGIN * (plan.peak - process) + process


def fits(plan: MemoryPlan, memory: int) -> bool:
    """In so many bytes."""
    return needed(plan) <= memory


def changes(setting: Setting) -> Iterator[tuple[Setting, tuple[str, ...]]]:
    """Settings of the same global batch, those of few changes first; of as many, those that cost less."""
    found = []
    for rows in _fewer(setting.rows):
        for checkpointing in sorted({setting.checkpointing, True}):
            for optimizer in _optimizers(setting):
                changed = replace(
                    setting,
                    rows=rows,
                    accumulated=setting.accumulated * setting.rows // rows,
                    checkpointing=checkpointing,
                    optimizer=optimizer,
                )
                flags = _flags(setting, changed)
                slower = changed.checkpointing != setting.checkpointing
                if flags:
                    found.append((len(flags), slower, -rows, changed, flags))
    for *_, changed, flags in sorted(found, key=lambda one: one[:3]):
        yield changed, flags


def smallest_change(
    setting: Setting, memory: int, evaluate: Callable[[Setting], MemoryPlan], least: Callable[[Setting], int]
) -> Change | None:
    """The first of `changes` that fits in `memory` bytes; None where none does.

    evaluate: what a setting takes. least: bytes that it surely takes, found without a stand-in.
    """
    for changed, flags in changes(setting):
        if MARGIN * least(changed) <= memory and fits(plan := evaluate(changed), memory):
            return Change(changed, flags, plan)
    return None


def least_setting(setting: Setting) -> tuple[Setting, tuple[str, ...]]:
    """All changes at once."""
    rows = _fewer(setting.rows)[-1]
    least = replace(
        setting,
        rows=rows,
        accumulated=setting.accumulated * setting.rows // rows,
        checkpointing=True,
        optimizer=_optimizers(setting)[-1],
    )
    return least, _flags(setting, least)


def _fewer(rows: int) -> list[int]:
    """rows, and its halves as long as they are whole."""
    halvings = int(math.log2(rows & -rows))
    return [rows >> count for count in range(halvings + 1)]


def _optimizers(setting: Setting) -> list[str]:
    """bitsandbytes does not know of shards."""
    name = setting.optimizer
    return [name, EIGHT_BIT] if name in _ADAMW and not setting.sharded else [name]


def _flags(setting: Setting, changed: Setting) -> tuple[str, ...]:
    """From one to the other, one entry for each change."""
    flags = []
    if changed.optimizer != setting.optimizer:
        flags.append(f"--optim {changed.optimizer}")
    if changed.checkpointing != setting.checkpointing:
        flags.append("--gradient-checkpointing")
    if changed.rows != setting.rows:
        batch = f"--per-device-train-batch-size {changed.rows}"
        flags.append(f"{batch} --gradient-accumulation-steps {changed.accumulated}")
    return tuple(flags)
