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
    """One tensor of the student.

    embedding: of tokens, perhaps shared with the LM head; ternary: latent; layer: of the decoder, None around
    it.
    """

    shape: tuple[int, ...]
    item: int  # bytes of a number
    trained: bool
    embedding: bool = False
    ternary: bool = False
    layer: int | None = None

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
    name: str,
    options: Mapping[str, Any],
    parameters: Sequence[Parameter],
    on_gpu: bool,
    decays: bool = False,
) -> OptimizerMemory:
    """Of an optimizer over the trained ones of `parameters`; UserError for one that is not known here.

    name: of --optim, or ROUNDING. options: what it is made with (`momentum`, `centered`). decays: whether
    there is a weight decay.
    """
    trained = [one for one in parameters if one.trained]
    if name in _BITSANDBYTES:
        return _bitsandbytes(name, options, trained, on_gpu, decays)
    if name not in _TORCH:
        raise UserError(
            f"--optim {name}: its memory is not known to `plan`, though a training may use it; plan with one "
            f"of {', '.join(sorted(set(_TORCH) - {ROUNDING} | set(_BITSANDBYTES)))}"
        )
    state = sum(_TORCH[name](one, options) for one in trained)
    return OptimizerMemory(state, temporary=_temporary(name, trained, on_gpu, decays))


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
# Copies of a parameter that an update makes and drops, on a CPU and on a GPU, and where weight decay makes
# another one.
_COPIES = {
    "adamw_torch": (2, 1),
    "adamw_torch_fused": (0, 0),
    "adagrad": (1, 2),
    "adafactor": (2, 2),
    "sgd": (0, 0),
    "rmsprop": (1, 1),
}
_DECAYED = ("sgd", "rmsprop", "adagrad")
# Bytes per number, by those of the parameter: the root of the second moment, and where it is bfloat16 also
# gradient, value, noise and result of the rounding.
_ROUNDING = {4: 4, 2: 5 * 4 + 2}
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
    name: str, options: Mapping[str, Any], trained: Sequence[Parameter], on_gpu: bool, decays: bool
) -> OptimizerMemory:
    states, paging = _BITSANDBYTES[name], "paged" in name and on_gpu
    low = options.get("optim_bits") == 8
    state = (2 if low else 0) * _TABLE
    paged = temporary = 0
    for one in trained:
        if low and not one.embedding and one.count >= _SMALLEST_8BIT:
            values, maxima = states * one.count, states * -(-one.count // _BLOCK) * _FLOAT
            copies = 3 if "rmsprop" in name else 5
        else:
            values, maxima = states * one.count * _FLOAT, 0
            copies = 3 + (decays and "rmsprop" in name)
        temporary = max(temporary, copies * one.count * _FLOAT)
        state += maxima
        if paging and one.count >= _SMALLEST_PAGED:
            paged += values
        else:
            state += values
    # A GPU's kernels need no copies; the update of a CPU is written in operations of torch.
    return OptimizerMemory(state, paged, 0 if on_gpu else temporary)


def _temporary(name: str, trained: Sequence[Parameter], on_gpu: bool, decays: bool) -> int:
    """At most, while weights are updated: torch's own take all of them at once on a GPU, else one by one."""
    if name == ROUNDING:
        return max((one.count * _ROUNDING[one.item] for one in trained), default=0)
    at_once = sum if on_gpu and name != "adafactor" else max
    copies = _COPIES[name][on_gpu] + (decays and name in _DECAYED)
    return copies * at_once([one.count * _FLOAT for one in trained] or [0])
