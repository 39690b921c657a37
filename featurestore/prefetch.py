"""Having shards at hand before they are read: lookahead on the order of an epoch, which is known."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

from featurestore.errors import FeatureStoreError
from featurestore.order import WINDOW_SHARDS


def prefetched(
    order: Sequence[int],
    shards: Sequence[Sequence[int]],
    warm: Callable[[int], None],
    ahead: int = WINDOW_SHARDS,
) -> Iterator[int]:
    """Yield `order`; a thread meanwhile calls `warm` with the first sample of each shard that it comes to.

    shards: lists of the indices that `order` is made of. The thread is at most `ahead` shards in front of
    what was yielded, one window of featurestore.order by default. What it finds damaged or out of reach it
    leaves to the reader, which says so in its place. It ends with the iteration.
    """
    shard_of = {index: number for number, shard in enumerate(shards) for index in shard}
    first: dict[int, int] = {}
    for index in order:
        first.setdefault(shard_of[index], index)
    permits, stopped = threading.Semaphore(ahead), threading.Event()

    def run() -> None:
        for index in first.values():
            permits.acquire()
            if stopped.is_set():
                return
            try:
                warm(index)
            except FeatureStoreError:
                return

    threading.Thread(target=run, name="prefetch", daemon=True).start()
    come_to: set[int] = set()
    try:
        for index in order:
            if shard_of[index] not in come_to:
                come_to.add(shard_of[index])
                permits.release()
            yield index
    finally:
        stopped.set()
        permits.release()
