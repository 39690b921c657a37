"""Which shards the commands on one store are at, so that they do not do the same work.

A claim never keeps anybody from a shard. Who finds the fresh claim of another leaves the shard to the end,
waits there as long as shards usually take, and captures it unless it is committed by then. So a claim whose
command was killed on another machine costs no more than that; of this machine's commands it is known which
are alive.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from featurestore.errors import CorruptionError
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
_MAX_BYTES = 1024
# Shards of this command that may still be in the making.
_KEPT = 64


class Claims:
    """The claims of one command."""

    def __init__(self, store: FeatureStore) -> None:
        self._store, self._mine = store, deque[str]()
        self._here = _this_process()
        self._content = json.dumps(self._here).encode("utf-8")
        self._began, self._taken = time.monotonic(), 0

    def take(self, work: Work) -> bool:
        """Claim a shard; False where another command has done so, not long ago."""
        root, name = self._store.root, f"{FOLDER}/{work.task.id}"
        if self._store.holds(work.task, work.groups):
            return True
        with writing("a claim", self._store.path):
            if not root.publish(name, self._content):
                if name not in self._mine and self._age(name) < _FRESH_SECONDS and not self._dead(name):
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
        usual = (time.monotonic() - self._began) / self._taken if self._taken else 0.0
        patience = min(max(_SHARDS_AT_ONCE * usual, 1.0), _FRESH_SECONDS)
        name = f"{FOLDER}/{work.task.id}"
        while not self._store.holds(work.task, work.groups):
            if self._age(name) >= patience or self._dead(name):
                return
            time.sleep(_POLL_SECONDS)

    def release(self) -> None:
        """Remove the claims: all is committed."""
        while self._mine:
            self._drop()

    def _age(self, name: str) -> float:
        state = self._store.root.state(name)
        return float("inf") if state is None else self._store.root.now() - state.modified

    def _dead(self, name: str) -> bool:
        """Whether a process of this machine made the claim and has ended."""
        try:
            maker = self._store.root.load(name, lambda data, _: json.loads(data), _MAX_BYTES)
        except (CorruptionError, ValueError, RecursionError):
            return False
        if not isinstance(maker, dict) or maker.get("machine") != self._here["machine"]:
            return False
        try:
            return bool(psutil.Process(maker.get("pid")).create_time() != maker.get("began"))
        except psutil.NoSuchProcess:
            return True
        except (psutil.Error, TypeError, ValueError, OverflowError):
            return False

    def _drop(self) -> None:
        with suppress(OSError):
            self._store.root.remove(self._mine.popleft(), lambda _: False)


def _this_process() -> dict[str, Any]:
    """What tells a process from every other one. Containers of one machine count their processes apart."""
    parts = [platform.node()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        parts.append(str(Path("/proc/self/ns/pid").stat().st_ino))
    pid = os.getpid()
    return {"machine": " ".join(parts), "pid": pid, "began": psutil.Process(pid).create_time()}
