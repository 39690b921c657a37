"""Having shards at hand before they are read: lookahead on the order of an epoch, which is known."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator

from featurestore.errors import FeatureStoreError
from featurestore.order import WINDOW_BLOCKS

# Of so many shards it is known that they were come to: those of the windows before and after a step.
_REMEMBERED = 4 * WINDOW_BLOCKS


def prefetched(
    order: Iterable[int],
    shard: Callable[[int], int],
    warm: Callable[[int], None],
    ahead: int = WINDOW_BLOCKS,
) -> Iterator[int]:
    """Yield `order`; a thread meanwhile calls `warm` with the first sample of each shard that it comes to.

    order: gives the same each time that it is iterated. shard: the shard of a sample. The thread is at most
    `ahead` shards in front of what was yielded, one window of featurestore.order by default, and passes over
    what was yielded before it came to it, as when a run that resumes skips steps. What it finds damaged or
    out of reach it leaves to the reader, which says so in its place. It ends with the iteration.
    """
    permits, stopped = threading.Semaphore(ahead), threading.Event()
    reached = 0

    def run() -> None:
        for number, index in enumerate(index for index, first in _come_to(order, shard) if first):
            permits.acquire()
            if stopped.is_set():
                return
            if number < reached - 1:
                continue
            try:
                warm(index)
            except FeatureStoreError:
                return

    threading.Thread(target=run, name="prefetch", daemon=True).start()
    try:
        for index, first in _come_to(order, shard):
            if first:
                reached += 1
                permits.release()
            yield index
    finally:
        stopped.set()
        permits.release()


def _come_to(order: Iterable[int], shard: Callable[[int], int]) -> Iterator[tuple[int, bool]]:
    """Each index of the order, and whether it is the first of its shard (for long)."""
    seen: OrderedDict[int, None] = OrderedDict()
    for index in order:
        number = shard(index)
        yield index, number not in seen
        seen[number] = None
        seen.move_to_end(number)
        if len(seen) > _REMEMBERED:
            seen.popitem(last=False)
