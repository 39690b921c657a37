"""What a GPU did, by its own account: the time between steps, memory at its highest, launches and waits.

None stands for what a CPU has no number of.
"""

from __future__ import annotations

import gc
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

# Names of the CUDA runtime's and driver's calls, as the profiler lists them. A cudaDeviceSynchronize is the
# profiler's own, or ours.
_LAUNCHES = ("cudaLaunchKernel", "cudaLaunchCooperativeKernel", "cuLaunchKernel", "cudaGraphLaunch")
_WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")
_SAMPLE_SECONDS = 0.05


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Laps:
    """Times at the ends of steps. On a GPU they are events of its stream, so that nobody waits for them."""

    def __init__(self) -> None:
        self._cuda = torch.cuda.is_available()
        self._events: list[torch.cuda.Event] = []
        self._times: list[float] = []

    def mark(self) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)
        else:
            self._times.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Between neighbouring marks; waits for the last."""
        if self._cuda:
            self._events[-1].synchronize()
            pairs = zip(self._events[:-1], self._events[1:], strict=True)
            return [begin.elapsed_time(end) / 1e3 for begin, end in pairs]
        return [end - begin for begin, end in zip(self._times[:-1], self._times[1:], strict=True)]

    def median(self) -> float:
        return statistics.median(self.seconds())


def fresh_memory() -> None:
    """Give back what nobody holds, and begin a new peak."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def held_bytes() -> int:
    """Of tensors on the GPU; 0 on a CPU."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def peak_bytes() -> int | None:
    """The most that tensors of this process held on the GPU since `fresh_memory`."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


class Calls(NamedTuple):
    """Kernels launched, and times that the host waited for the GPU."""

    launches: int
    waits: int


def count_calls(counts: Mapping[str, int]) -> Calls:
    """Of how often each name of an event occurred."""
    launches = sum(count for name, count in counts.items() if name.startswith(_LAUNCHES))
    return Calls(launches, sum(count for name, count in counts.items() if name in _WAITS))


def calls_of(run: Callable[[], object]) -> Calls | None:
    """What `run` calls, of all threads; on a CPU, and where the profiler may not listen, it only runs."""
    if not torch.cuda.is_available():
        run()
        return None
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    calls = count_calls({event.key: event.count for event in profiler.key_averages()})
    return calls if calls.launches else None


class DevicePeak:
    """Bytes of the GPU that were in use at the most above what was at first, whoever used them."""

    def __init__(self) -> None:
        self.first, self.most = 0, 0

    @property
    def bytes(self) -> int | None:
        return self.most - self.first if torch.cuda.is_available() else None


@contextmanager
def device_peak() -> Iterator[DevicePeak]:
    """Sampled by a thread: vLLM computes in a process of its own, whose tensors torch here does not know."""
    found, ended = DevicePeak(), threading.Event()
    if not torch.cuda.is_available():
        yield found
        return

    def used() -> int:
        free, total = torch.cuda.mem_get_info()
        return total - free

    def sample() -> None:
        while not ended.wait(_SAMPLE_SECONDS):
            found.most = max(found.most, used())

    found.first = found.most = used()
    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()
