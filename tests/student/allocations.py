"""What torch's allocator of the CPU really held, to be compared with what was planned."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from typing import TypeVar

from torch.profiler import ProfilerActivity, profile, record_function

Built = TypeVar("Built")
_STEPS = "steps of a training"


def allocated_at_most(build: Callable[[], Built], train: Callable[[Built], object]) -> tuple[Built, int]:
    """What was built and trained, and the bytes that were allocated at the fullest moment of the training.

    The allocator tells the profiler of every block, also of those that no operation returns. Memory that only
    numpy knows is not in it: most of a batch.
    """
    gc.collect()  # what an earlier training has left would be taken off otherwise, when it is freed
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        built = build()
        with record_function(_STEPS):
            train(built)
    assert recorded.profiler is not None
    events = recorded.profiler.kineto_results.events()
    began = next(event.start_ns() for event in events if event.name() == _STEPS)
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    changes.sort(key=lambda change: change[0])
    levels = itertools.accumulate(size for _, size in changes)
    peak = max(level for (when, _), level in zip(changes, levels, strict=True) if when >= began)
    return built, peak
