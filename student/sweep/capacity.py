"""How many runs at once. Pure but for `this_machine`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MARGIN = 1.1  # of what a run was seen to take
CUDA_CONTEXT = 600 * 2**20  # bytes that a process takes of a GPU beside its tensors


@dataclass(frozen=True)
class Machine:
    """memory: bytes that were available when the sweep began; gpus: total bytes of each."""

    cores: int
    memory: int
    gpus: tuple[int, ...] = ()


@dataclass(frozen=True)
class PeakMemory:
    """What one run took at its peak, in bytes; cuda: None without a GPU."""

    memory: int
    cuda: int | None = None


def at_once(machine: Machine, seen: Sequence[PeakMemory]) -> int:
    """Runs that fit, by the largest that have ended; one while nothing is known.

    On CPUs a run has at least a core to itself.
    """
    if not seen:
        return 1
    room = machine.memory / (MARGIN * max(need.memory for need in seen))
    cuda = max((need.cuda for need in seen if need.cuda is not None), default=None)
    if cuda is None or not machine.gpus:
        return max(1, min(machine.cores, int(room)))
    fit = sum(int(gpu / (MARGIN * cuda + CUDA_CONTEXT)) for gpu in machine.gpus)
    return max(1, min(fit, int(room)))


def this_machine() -> Machine:
    """Cores of this process, available memory, GPUs."""
    import torch

    gpus = (
        tuple(torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count()))
        if torch.cuda.is_available()
        else ()
    )
    return Machine(_cores(), _available(), gpus)


def visible(index: int) -> str:
    """CUDA_VISIBLE_DEVICES for GPU `index` of those that this process sees."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    return names.split(",")[index].strip() if names else str(index)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _available() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
