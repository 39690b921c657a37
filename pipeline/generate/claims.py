"""Which shards the commands on one store are at, so that they do not do the same work.

A claim never keeps anybody from a shard. Who finds the fresh claim of another leaves the shard to the end,
waits there as long as shards usually take, and captures it unless it is committed by then. So a claim whose
command was killed costs no more than that.
"""

from __future__ import annotations

import os
import time
from collections import deque
from contextlib import suppress

from featurestore.format.plan import Work
from featurestore.storage.files import writing
from featurestore.store import FeatureStore

FOLDER = "claims"
# By the clock of the store's place. A shard takes five minutes at most, and a few of an engine wait.
_FRESH_SECONDS = 900.0
# An engine, its encoders and who commits have some shards between them: a shard takes so many times as long
# as passes between two of them.
_SHARDS_AT_ONCE = 8
_POLL_SECONDS = 0.25
# Shards of this command that may still be in the making.
_KEPT = 64


class Claims:
    """The claims of one command."""

    def __init__(self, store: FeatureStore) -> None:
        self._store, self._mine = store, deque[str]()
        self._content = os.urandom(8).hex().encode("ascii")
        self._began, self._taken = time.monotonic(), 0

    def take(self, work: Work) -> bool:
        """Claim a shard; False where another command has done so, not long ago."""
        root, name = self._store.root, f"{FOLDER}/{work.task.id}"
        if self._store.holds(work.task, work.groups):
            return True
        with writing("a claim", self._store.path):
            if not root.publish(name, self._content):
                if name not in self._mine and self._age(name) < _FRESH_SECONDS:
                    return False
                root.remove(name, lambda _: False)
                root.publish(name, self._content)
        self._taken += 1
        self._mine.append(name)
        if len(self._mine) > _KEPT:
            self._drop()
        return True

    def wait(self, work: Work) -> None:
        """Return when a shard that another has claimed is committed, or should have been long ago."""
        usual = (time.monotonic() - self._began) / max(self._taken, 1)
        patience = min(max(_SHARDS_AT_ONCE * usual, 1.0), _FRESH_SECONDS)
        name = f"{FOLDER}/{work.task.id}"
        while not self._store.holds(work.task, work.groups) and self._age(name) < patience:
            time.sleep(_POLL_SECONDS)

    def release(self) -> None:
        """Remove the claims: all is committed."""
        while self._mine:
            self._drop()

    def _age(self, name: str) -> float:
        state = self._store.root.state(name)
        return float("inf") if state is None else self._store.root.now() - state.modified

    def _drop(self) -> None:
        with suppress(OSError):
            self._store.root.remove(self._mine.popleft(), lambda _: False)
