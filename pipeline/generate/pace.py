"""How fast a teacher will run: as in earlier runs of the store, else by how fast the machine multiplies.

From the same rate follow the sizes that keep a slow machine responsive: positions of one engine step, of a
shard, and of the first shard.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from distily.system.machine import product_seconds

# The share of the machine's matrix-product rate that a prefill reaches; attention, norms and the reduction of
# logits are in it.
EFFICIENCY = 0.5
# Multiply and add, for every parameter and token.
OPERATIONS = 2
# Rows, inputs and outputs of the product that is measured: about those of a small model's layer on a CPU.
_TYPES = ("float32", "bfloat16", "float16")
_CPU_SHAPE, _CUDA_SHAPE = (256, 768, 2304), (8192, 8192, 8192)

# What an engine step may take on a CPU. Progress, Ctrl-C and the first shard wait for no longer than this.
STEP_SECONDS = 5.0
STEP_TOKENS = range(16, 4096)
# What a kill may lose: the shard in the making. The first one is smaller, for runs that end in their first
# minutes.
SHARD_SECONDS, FIRST_SHARD_SECONDS = 300.0, 20.0
SHARD_TOKENS = range(512, 32_768)


@dataclass(frozen=True)
class Pace:
    """Tokens per second of capture, the engine's start not counted, and in words where the number is from."""

    tokens_per_second: float
    source: str

    def seconds(self, tokens: int) -> float:
        """How long `tokens` take."""
        return tokens / self.tokens_per_second

    def tokens(self, seconds: float, bounds: range) -> int:
        """How many tokens take `seconds`, within `bounds` (its stop included)."""
        return min(max(int(self.tokens_per_second * seconds), bounds.start), bounds.stop)


def earlier_pace(records: Iterable[Mapping[str, Any]], engine: str) -> Pace | None:
    """The median pace of a store's earlier runs with `engine`, from their provenance; None without any."""
    rates = [rate for record in records if (rate := _rate(record, engine)) is not None]
    if not rates:
        return None
    runs = "1 earlier run" if len(rates) == 1 else f"{len(rates)} earlier runs"
    return Pace(median(rates), f"from {runs} of this store")


def rough_pace(operations_per_second: float, parameters: int) -> Pace:
    """The pace of a teacher with so many parameters on a machine of that matrix-product rate."""
    rate = operations_per_second * EFFICIENCY / (OPERATIONS * parameters)
    return Pace(rate, "rough: from this machine's matrix-product rate")


def matrix_product_rates() -> dict[str, float]:
    """Operations per second of a matrix product in each type that teachers have, measured once per machine.

    On the first GPU where there is one, else on the CPU.
    """
    import torch

    on_gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name(0) if on_gpu else f"cpu, {torch.get_num_threads()} threads"
    rows, inputs, outputs = _CUDA_SHAPE if on_gpu else _CPU_SHAPE

    def product(dtype: str) -> None:
        kind = {"dtype": getattr(torch, dtype), "device": "cuda" if on_gpu else "cpu"}
        torch.nn.functional.linear(torch.ones(rows, inputs, **kind), torch.ones(outputs, inputs, **kind))
        if on_gpu:
            torch.cuda.synchronize()

    seconds = product_seconds(_TYPES, product, f"torch {torch.__version__}, {device}")
    return {dtype: OPERATIONS * rows * inputs * outputs / took for dtype, took in seconds.items()}


def _rate(record: Mapping[str, Any], engine: str) -> float | None:
    request = record.get("request")
    if not isinstance(request, dict) or request.get("engine") != engine:
        return None
    tokens, seconds = record.get("tokens"), record.get("capture_seconds")
    if not isinstance(tokens, int | float) or not isinstance(seconds, int | float):
        return None
    return tokens / seconds if tokens > 0 and seconds > 0 else None
