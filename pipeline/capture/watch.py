"""The engine's processes end with the command that started them, however that command ended.

vLLM's core process outlives a parent that was killed, and would keep the teacher's memory for good.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from distily.vllm_plugin import DRIVER_VARIABLE

_POLL_SECONDS = 1.0


@contextmanager
def announced_driver() -> Iterator[None]:
    """In the command: name it to the processes that vLLM starts meanwhile; they inherit the environment.

    What the caller starts later, a vLLM of its own for one, hears nothing from us.
    """
    before = os.environ.get(DRIVER_VARIABLE)
    os.environ[DRIVER_VARIABLE] = str(os.getpid())
    try:
        yield
    finally:
        del os.environ[DRIVER_VARIABLE]
        if before is not None:
            os.environ[DRIVER_VARIABLE] = before


def end_with_driver() -> None:
    """In an engine process: end hard once the announced process is gone; a no-op in that process."""
    driver = int(os.environ.get(DRIVER_VARIABLE, "0"))
    if driver in (0, os.getpid()):
        return
    try:
        process = psutil.Process(driver)
    except psutil.NoSuchProcess:
        os._exit(1)
    threading.Thread(target=_watch, args=(process,), daemon=True).start()


def _watch(driver: psutil.Process) -> None:
    while _alive(driver):
        time.sleep(_POLL_SECONDS)
    os._exit(1)


def _alive(process: psutil.Process) -> bool:
    """Running in truth: neither a zombie nor another process under the same number."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
