"""How fast a teacher will run: as in earlier runs of the store, else by how fast the machine multiplies."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

# The share of the machine's matrix-product rate that a prefill reaches; attention, norms and the reduction of
# logits are in it.
EFFICIENCY = 0.5
# Multiply and add, for every parameter and token.
OPERATIONS = 2
_MEASURE_SECONDS = 0.3
_CPU_SIZE, _CUDA_SIZE = 1024, 8192


@dataclass(frozen=True)
class Pace:
    """Tokens per second of capture, the engine's start not counted, and in words where the number is from."""

    tokens_per_second: float
    source: str

    def seconds(self, tokens: int) -> float:
        """How long `tokens` take."""
        return tokens / self.tokens_per_second


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


def matrix_product_rate(dtype: str) -> float:
    """Operations per second of a square matrix product in the torch dtype `dtype`, measured for 0.3 s.

    On the first GPU where there is one, else on the CPU.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = _CUDA_SIZE if device == "cuda" else _CPU_SIZE
    matrix = torch.ones(size, size, dtype=getattr(torch, dtype), device=device)

    def product() -> float:
        began = time.perf_counter()
        torch.matmul(matrix, matrix)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    product()  # the first one starts threads and picks a kernel
    took = [product()]
    while sum(took) < _MEASURE_SECONDS:
        took.append(product())
    return OPERATIONS * size**3 / median(took)


def _rate(record: Mapping[str, Any], engine: str) -> float | None:
    request = record.get("request")
    if not isinstance(request, dict) or request.get("engine") != engine:
        return None
    tokens, seconds = record.get("tokens"), record.get("capture_seconds")
    if not isinstance(tokens, int | float) or not isinstance(seconds, int | float):
        return None
    return tokens / seconds if tokens > 0 and seconds > 0 else None
