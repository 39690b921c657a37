"""Small independent pieces of work side by side on a CPU, each on one thread.

torch splits every operation over all threads and waits for the slowest of them at its end. On tiles that fit
a core's cache that wait costs more than the work, many times more where other programs run beside it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")


def run_tiles(function: Callable[[int], T], starts: Iterable[int]) -> list[T]:
    """`function` of each of `starts`, in order, on as many threads as torch has here."""
    threads, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()

    def one(start: int) -> T:
        with torch.inference_mode(inference):  # each thread has a mode of its own
            return function(start)

    if threads == 1:
        return [one(start) for start in starts]
    return list(_pool(threads, os.getpid()).map(one, starts))


@lru_cache(maxsize=1)
def _pool(threads: int, _process: int) -> ThreadPoolExecutor:
    """Threads that torch does not split further; a forked process makes its own."""
    cores, all_there = _cores(), threading.Barrier(threads)

    def begin() -> None:
        # vLLM ties its worker's main thread to one core, and a thread begins where its parent is tied.
        os.sched_setaffinity(0, cores)
        torch.get_num_threads()  # a thread's first question would undo what is set before it
        torch.set_num_threads(1)
        all_there.wait()

    pool = ThreadPoolExecutor(threads, "tiles", initializer=begin)
    list(pool.map(lambda _: None, range(threads)))
    torch.set_num_threads(threads)  # the last value set anywhere is what later threads begin with
    return pool


def _cores() -> set[int]:
    """All cores that any thread of this process may run on."""
    cores = set(os.sched_getaffinity(0))
    for task in Path("/proc/self/task").glob("[0-9]*"):
        try:
            cores |= os.sched_getaffinity(int(task.name))
        except OSError:  # it has ended
            continue
    return cores
