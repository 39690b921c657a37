"""vLLM's processes under watch: what they print kept aside, their death noticed, none of them left behind.

vLLM waits for good for an engine core that was killed, prints a traceback for every process that a failure
passes through, and writes to the stdout on which `--json` has its say.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from threading import Thread
from typing import TypeVar

import psutil  # vLLM requires it

from pipeline.errors import EngineError, RequestError

T = TypeVar("T")

_POLL_SECONDS = 0.5
_GRACE_SECONDS = 10.0
_LOG_TAIL = 2**20
_GOES_ON = "what was committed is kept and the same command goes on from there; --verbose shows vLLM's own log"
_LESS_MEMORY = (
    "lower --max-num-batched-tokens or --max-seq-len, or load the teacher with --teacher-load-in-8bit"
)
_ERROR_LINE = re.compile(r"(?:^|\s)((?:\w+\.)*[A-Z]\w*(?:Error|Exception): .+)$", re.M)
# vLLM repeats a failure in every process above the one that failed, pointing downwards.
_POINTS_ELSEWHERE = re.compile(r"root cause|stack trace|: cancelled$|EngineDeadError", re.I)
_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|MemoryError|Cannot allocate", re.I)
_WORKER_DIED = re.compile(r"died unexpectedly")


def failure_cause(exit_codes: list[int], log: str) -> str:
    """One clause that says why an engine ended, from its processes' exit codes and what they printed."""
    for code in exit_codes:
        if code < 0:
            name = signal.Signals(-code).name
            memory = "; the system does that when memory runs out" if name == "SIGKILL" else ""
            return f"the vLLM worker died: signal {-code} ({name}){memory}"
    errors = [line for line in _ERROR_LINE.findall(log) if not _POINTS_ELSEWHERE.search(line)]
    for line in errors:
        if _MEMORY.search(line):
            return f"the vLLM worker ran out of memory ({shorten(line)}); {_LESS_MEMORY}"
    if _WORKER_DIED.search(log):
        return "a vLLM worker died: killed, perhaps by the system when memory ran out"
    if errors:
        return f"the vLLM worker failed: {shorten(errors[0])}"
    return f"the vLLM worker ended with exit code {', '.join(map(str, exit_codes)) or 'unknown'}"


def shorten(text: str, limit: int = 300) -> str:
    """`text` in one line of at most `limit` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


class EngineProcesses:
    """The processes of one engine, from its start to its end. There may be none: vLLM can run in ours."""

    def __init__(self, verbose: bool) -> None:
        self._log = None if verbose else tempfile.TemporaryFile()  # noqa: SIM115  (closed by `end`)
        self._cores: list[BaseProcess] = []
        self._all: list[psutil.Process] = []

    @contextmanager
    def starting(self) -> Iterator[None]:
        """Around the start of vLLM: what starts meanwhile belongs to it and prints into our log.

        With --verbose it prints on stderr, never on stdout.

        Raises:
            EngineError: vLLM did not start; the message says why.
        """
        before = set(multiprocessing.active_children())
        try:
            with _redirected(self._log.fileno() if self._log else 2):
                yield
        except RequestError:
            raise
        except Exception as error:
            cause = failure_cause(self._exit_codes(), self._printed())
            text = str(error)
            if not _POINTS_ELSEWHERE.search(text):
                cause = shorten(text)
                cause += f"; {_LESS_MEMORY}" if _MEMORY.search(text) else ""
            raise EngineError(f"vLLM did not start: {cause} (--verbose shows vLLM's own log)") from error
        finally:
            self._cores = [core for core in multiprocessing.active_children() if core not in before]
            self._all = [child for core in self._cores for child in _descendants(core)]

    def call(self, function: Callable[[], T]) -> T:
        """The result of a call into vLLM, which may wait for its processes.

        Raises:
            EngineError: they are dead; the message says why and what remains.
        """
        if not self._cores:
            return function()
        from vllm.v1.engine.exceptions import EngineDeadError

        answer: Future[T] = Future()
        # A daemon: where the core is gone the call may never return.
        Thread(target=_answer, args=(function, answer), daemon=True, name="vllm-call").start()
        while not wait([answer], timeout=_POLL_SECONDS).done:
            if not all(core.is_alive() for core in self._cores):
                wait([answer], timeout=_POLL_SECONDS)
                break
        error = answer.exception() if answer.done() else EngineDeadError()
        if error is None:
            return answer.result()
        if not isinstance(error, EngineDeadError):
            raise error
        for core in self._cores:
            core.join(_GRACE_SECONDS)
        raise EngineError(f"{failure_cause(self._exit_codes(), self._printed())}; {_GOES_ON}") from error

    def end(self) -> None:
        """Make sure that none of them is left."""
        deadline = time.monotonic() + _GRACE_SECONDS
        for core in self._cores:
            core.join(max(0.0, deadline - time.monotonic()))
            if core.is_alive():
                core.kill()
                core.join()
        for process in self._all:
            if process.is_running():
                process.kill()
        if self._log is not None:
            self._log.close()

    def _exit_codes(self) -> list[int]:
        return [core.exitcode for core in self._cores if core.exitcode]

    def _printed(self) -> str:
        """The end of what the processes printed; nothing with --verbose, where the user has seen it."""
        if self._log is None:
            return ""
        size = os.fstat(self._log.fileno()).st_size
        tail = os.pread(self._log.fileno(), _LOG_TAIL, max(0, size - _LOG_TAIL))
        return tail.decode("utf-8", errors="replace")


@contextmanager
def _redirected(target: int) -> Iterator[None]:
    """Send this process's stdout and stderr, and those of processes started meanwhile, to `target`."""
    sys.stdout.flush()
    kept = os.dup(1), os.dup(2)
    try:
        os.dup2(target, 1)
        os.dup2(target, 2)
        yield
    finally:
        sys.stdout.flush()
        for number, old in zip((1, 2), kept, strict=True):
            os.dup2(old, number)
            os.close(old)


def _descendants(core: BaseProcess) -> list[psutil.Process]:
    try:
        return psutil.Process(core.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _answer(function: Callable[[], T], answer: Future[T]) -> None:
    try:
        answer.set_result(function())
    except BaseException as error:
        answer.set_exception(error)
