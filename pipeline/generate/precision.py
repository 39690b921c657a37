"""What a teacher computes in with `--dtype auto`: as saved, unless the machine is slow at that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from distily.system.machine import fast_dtype

FLOAT32 = "float32"
_BYTES = 4
# What weights in float32 may take of the memory that is free; activations need room beside them.
_SHARE_OF_MEMORY = 0.6


@dataclass(frozen=True, kw_only=True)
class Precision:
    """A torch dtype's name, and why it was chosen: "" where there was nothing to choose."""

    dtype: str
    reason: str = ""


def choose_precision(
    asked: str,
    saved: str,
    *,
    stored: str | None,
    quantised: bool,
    parameters: int,
    free_memory: int,
    rates: Callable[[], Mapping[str, float]],
) -> Precision:
    """The compute type of a teacher.

    Args:
        asked: the value of `--dtype`.
        saved: the type of the checkpoint.
        stored: the type of the rows that the store at `--out` holds; None where it holds none.
        quantised: the weights are saved or loaded in fewer bits, for kernels that expect the saved type.
        parameters: of the teacher.
        free_memory: bytes for its weights.
        rates: operations per second in each type; called only if it matters.
    """
    if asked != "auto":
        return Precision(dtype=asked)
    if stored is not None:
        return Precision(dtype=stored, reason="" if stored == saved else "as in the store")
    if saved == FLOAT32 or quantised:
        return Precision(dtype=saved)
    seconds = {dtype: 1 / rate for dtype, rate in rates().items()}
    if fast_dtype(saved, seconds) == saved:
        return Precision(dtype=saved)
    ratio = seconds[saved] / seconds[FLOAT32]
    slower = f"this machine multiplies {saved} {ratio:.1f} times slower than float32"
    if parameters * _BYTES > _SHARE_OF_MEMORY * free_memory:
        return Precision(dtype=saved, reason=f"{slower}, but has too little memory for float32 weights")
    return Precision(dtype=FLOAT32, reason=f"{slower}; --dtype {saved} overrides this")
