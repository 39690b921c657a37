"""Bytes that optimizers keep and need, by the names of --optim, from shapes alone.

Checked against the real ones in tests/student/test_plan.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from student.errors import UserError

ROUNDING = "rounding"  # student.bitnet.RoundingAdamW, which comes with --bitnet-masters bf16
_FLOAT = 4
_STEP = 4  # torch counts the steps of each parameter in a float32 of its own
# Of bitsandbytes: smaller parameters have float32 states, as embeddings have (Trainer sees to it); states of
# 8 bits have one float32 maximum per block; a table of 256 float32 each for signed and unsigned states.
_SMALLEST_8BIT, _BLOCK, _TABLE = 4096, 256, 256 * _FLOAT
_SMALLEST_PAGED = 100_000


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One tensor of the student. embedding: of tokens, perhaps shared with the LM head; ternary: latent."""

    shape: tuple[int, ...]
    item: int  # bytes of a number
    trained: bool
    embedding: bool = False
    ternary: bool = False

    @property
    def count(self) -> int:
        """Numbers."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.count * self.item


@dataclass(frozen=True)
class OptimizerMemory:
    """Bytes. state: on the device; paged: in host memory; temporary: at most, during an update."""

    state: int
    paged: int = 0
    temporary: int = 0


def optimizer_memory(
    name: str, options: Mapping[str, Any], parameters: Sequence[Parameter], on_gpu: bool
) -> OptimizerMemory:
    """Of an optimizer over the trained ones of `parameters`; UserError for one that is not known here.

    name: of --optim, or ROUNDING. options: what it is made with (`momentum`, `centered`).
    """
    trained = [one for one in parameters if one.trained]
    if name in _BITSANDBYTES:
        return _bitsandbytes(name, options, trained, on_gpu)
    if name not in _TORCH:
        raise UserError(
            f"--optim {name}: its memory is not known to `plan`, though a training may use it; plan with one "
            f"of {', '.join(sorted(set(_TORCH) - {ROUNDING} | set(_BITSANDBYTES)))}"
        )
    state = sum(_TORCH[name](one, options) for one in trained)
    return OptimizerMemory(state, temporary=_temporary(name, trained, on_gpu))


def _floats(copies: int, step: bool = True) -> Callable[[Parameter, Mapping[str, Any]], int]:
    return lambda one, _: copies * one.size + _STEP * step


def _sgd(one: Parameter, options: Mapping[str, Any]) -> int:
    return one.size if options.get("momentum") else 0


def _rmsprop(one: Parameter, options: Mapping[str, Any]) -> int:
    return (1 + bool(options.get("momentum")) + bool(options.get("centered"))) * one.size + _STEP


def _adafactor(one: Parameter, _: Mapping[str, Any]) -> int:
    """Second moments of rows and columns, and the size of the last update."""
    if len(one.shape) < 2:
        return one.count * _FLOAT + _FLOAT
    rows, columns = one.shape[-2:]
    return one.count // (rows * columns) * (rows + columns) * _FLOAT + _FLOAT


_TORCH: dict[str, Callable[[Parameter, Mapping[str, Any]], int]] = {
    "adamw_torch": _floats(2),
    "adamw_torch_fused": _floats(2),
    "adagrad": _floats(1),
    "adafactor": _adafactor,
    "sgd": _sgd,
    "rmsprop": _rmsprop,
    ROUNDING: lambda one, _: 2 * one.count * _FLOAT,
}
# States of each number.
_BITSANDBYTES = {
    "adamw_bnb_8bit": 2,
    "adamw_8bit": 2,
    "paged_adamw_8bit": 2,
    "paged_adamw_32bit": 2,
    "lion_8bit": 1,
    "lion_32bit": 1,
    "paged_lion_8bit": 1,
    "paged_lion_32bit": 1,
    "rmsprop_bnb": 1,
    "rmsprop_bnb_8bit": 1,
    "rmsprop_bnb_32bit": 1,
}


def _bitsandbytes(
    name: str, options: Mapping[str, Any], trained: Sequence[Parameter], on_gpu: bool
) -> OptimizerMemory:
    states, paging = _BITSANDBYTES[name], "paged" in name and on_gpu
    low = options.get("optim_bits") == 8
    state = (2 if low else 0) * _TABLE
    paged = 0
    for one in trained:
        if low and not one.embedding and one.count >= _SMALLEST_8BIT:
            values, maxima = states * one.count, states * -(-one.count // _BLOCK) * _FLOAT
        else:
            values, maxima = states * one.count * _FLOAT, 0
        state += maxima
        if paging and one.count >= _SMALLEST_PAGED:
            paged += values
        else:
            state += values
    return OptimizerMemory(state, paged)


def _temporary(name: str, trained: Sequence[Parameter], on_gpu: bool) -> int:
    """At most, while weights are updated: all of them at once on a GPU, else one by one."""
    largest = max((one.count for one in trained), default=0) * _FLOAT
    if name in ("adamw_torch_fused", "sgd"):
        return 0
    if name == ROUNDING:  # of the update: its square root, its value, bits and noise of the rounding
        halved = max((one.count for one in trained if one.item == 2), default=0) * _FLOAT
        return max(3 * largest, 6 * halved)
    if name == "adafactor":
        return 3 * largest
    return sum(one.size for one in trained) if on_gpu else 2 * largest
