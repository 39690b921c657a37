"""Work on many files in threads: what takes long there releases Python's lock."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

# Disks and object stores are waited for, so a few threads are worth it on one core, too.
_FEWEST = 4


def in_order(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`function` of each item, in the order of the items; only a few are worked on ahead.

    Raises what `function` raises, at the place of its item, and starts no others then.

    Example:
        sizes = list(in_order(lambda path: path.stat().st_size, paths))
    """
    threads = max(len(os.sched_getaffinity(0)), _FEWEST)
    ahead: deque[Future[R]] = deque()
    with ThreadPoolExecutor(threads, "files") as pool:
        try:
            for item in items:
                ahead.append(pool.submit(function, item))
                if len(ahead) > 2 * threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()
