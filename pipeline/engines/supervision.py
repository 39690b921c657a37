"""vLLM's processes under watch: what they print kept aside, their death noticed, none of them left behind.

vLLM waits for good for an engine core that was killed, hears no Ctrl-C while it starts one, prints a
traceback for every process that a failure passes through, and writes to the stdout that `--json` writes to.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from threading import Thread
from typing import Any, TypeVar

import psutil

from distily.text import one_line
from pipeline.engines.memory import OUT_OF_MEMORY
from pipeline.errors import EngineError

T = TypeVar("T")

_POLL_SECONDS = 0.5
# To look for new processes goes through all of the machine's; vLLM hardly starts any after its start.
_LOOK_SECONDS = 10.0
# vLLM may notice a death by itself and know more of it than we do; and what it ends takes a moment.
_NOTICE_SECONDS = 2.0
_LOG_TAIL = 2**20
# Characters of a cause in an error line.
_LONG = 300
_SHOW_LOG = "--verbose shows vLLM's own log"
_LESS_MEMORY = (
    "lower --max-num-batched-tokens or --max-seq-len, load the teacher with --teacher-load-in-8bit, "
    "or change --gpu-memory-utilization on a GPU that other programs use"
)
_ERROR_LINE = re.compile(r"(?:^|\s)((?:\w+\.)*[A-Z]\w*(?:Error|Exception): .+)$", re.M)
# vLLM repeats a failure in every process above the one that failed, pointing downwards.
_POINTS_ELSEWHERE = re.compile(r"root cause|stack trace|(?:^|: )cancelled$|EngineDeadError", re.I)
_WORKER_DIED = re.compile(r"died unexpectedly")


def failure_cause(exit_codes: Sequence[int], log: str) -> str:
    """One clause that says why an engine ended, from its processes' exit codes and what they printed."""
    for code in exit_codes:
        if code < 0:
            name = signal.Signals(-code).name
            memory = f"; the system does that when memory runs out: {_LESS_MEMORY}" * (name == "SIGKILL")
            return f"the vLLM worker died: signal {-code} ({name}){memory}"
    errors = [line for line in _ERROR_LINE.findall(log) if not _POINTS_ELSEWHERE.search(line)]
    for line in errors:
        if OUT_OF_MEMORY.search(line):
            return f"the vLLM worker ran out of memory ({one_line(line, _LONG)}); {_LESS_MEMORY}"
    if _WORKER_DIED.search(log):
        return f"a vLLM worker died: killed, perhaps by the system when memory ran out: {_LESS_MEMORY}"
    if errors:
        return f"the vLLM worker failed: {one_line(errors[0], _LONG)}"
    return f"the vLLM worker ended with exit code {', '.join(map(str, exit_codes)) or 'unknown'}"


class EngineProcesses:
    """The processes of one engine, from its start to its end.

    `separate`: vLLM has processes of its own. If not it runs in ours, and there is nothing to watch.
    """

    def __init__(self, verbose: bool, separate: bool) -> None:
        self._log = None if verbose else tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115  (see end)
        self._diverted: list[tuple[logging.StreamHandler[Any], Any]] = []
        self._separate = separate
        self._ours = set(multiprocessing.active_children())
        self._children: set[BaseProcess] = set()
        self._workers: set[psutil.Process] = set()
        self._looked, self._look_seconds = time.monotonic(), 0.0

    def start(self, function: Callable[[], T]) -> T:
        """The result of starting vLLM; what starts meanwhile prints into our log, or on stderr if verbose.

        Raises:
            EngineError: vLLM did not start; the message says why.
        """
        try:
            with _redirected(self._log.fileno() if self._log else 2):
                result = self._run(function)
            self._look()
            self._look_seconds = _LOOK_SECONDS
            self._divert_logger()
            return result
        except Exception as error:
            text = str(error)
            if _POINTS_ELSEWHERE.search(text):
                cause = self._cause()
            else:
                cause = one_line(error, _LONG) + (f"; {_LESS_MEMORY}" if OUT_OF_MEMORY.search(text) else "")
            raise EngineError(f"vLLM did not start: {cause} ({_SHOW_LOG})") from error

    def call(self, function: Callable[[], T]) -> T:
        """The result of a call into vLLM, which may wait for its processes.

        Raises:
            EngineError: they are dead; the message says why.
        """
        with self._explained():
            return self._run(function)

    def wait(self, answer: Future[T]) -> T:
        """The result of a call into vLLM that another thread makes; EngineError as in `call`."""
        with self._explained():
            return self._wait(answer)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Errors of the body that come from dead processes come out as EngineError."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            yield
        except Exception as error:
            dead = any(process.exitcode is not None for process in self._children)
            if dead or isinstance(error, EngineDeadError) or _POINTS_ELSEWHERE.search(str(error)):
                raise EngineError(f"{self._cause()} ({_SHOW_LOG})") from error
            raise

    def end(self) -> None:
        """Make sure that none of them is left; vLLM has had its chance to end them."""
        self._look()
        for process in self._children:
            process.kill()
            process.join()
        for worker in self._workers:
            with suppress(psutil.NoSuchProcess):
                worker.kill()
        for handler, stream in self._diverted:
            handler.setStream(stream)
        if self._log is not None:
            self._log.close()

    def _divert_logger(self) -> None:
        """vLLM's scheduler may be in this process, and its logger writes to stdout."""
        ours = self._log or sys.stderr
        for handler in logging.getLogger("vllm").handlers:
            if isinstance(handler, logging.StreamHandler) and (stream := handler.setStream(ours)):
                self._diverted.append((handler, stream))

    def _run(self, function: Callable[[], T]) -> T:
        """`function()`, in a thread of its own, so that we hear of Ctrl-C and of deaths meanwhile."""
        if not self._separate:
            return function()
        answer: Future[T] = Future()
        # A daemon: the call may never return.
        Thread(target=_answer, args=(function, answer), daemon=True, name="vllm-call").start()
        return self._wait(answer)

    def _wait(self, answer: Future[T]) -> T:
        from vllm.v1.engine.exceptions import EngineDeadError

        while not answer.done() and not wait([answer], timeout=_POLL_SECONDS).done:
            if time.monotonic() > self._looked + self._look_seconds:
                self._look()
            if any(process.exitcode is not None for process in self._children):
                if not wait([answer], timeout=_NOTICE_SECONDS).done:
                    raise EngineDeadError
                break
        return answer.result()

    def _look(self) -> None:
        """Find what there is by now; the children of a core that is dead can no longer be found."""
        self._looked = time.monotonic()
        self._children |= set(multiprocessing.active_children()) - self._ours
        for process in self._children:
            if process.exitcode is None:
                with suppress(psutil.NoSuchProcess):
                    self._workers |= set(psutil.Process(process.pid).children(recursive=True))

    def _cause(self) -> str:
        for process in self._children:
            process.join(_NOTICE_SECONDS)
        printed = b""
        if self._log is not None:
            size = os.fstat(self._log.fileno()).st_size
            printed = os.pread(self._log.fileno(), _LOG_TAIL, max(0, size - _LOG_TAIL))
        codes = [process.exitcode for process in self._children if process.exitcode]
        return failure_cause(codes, printed.decode("utf-8", errors="replace"))


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


def _answer(function: Callable[[], T], answer: Future[T]) -> None:
    try:
        answer.set_result(function())
    except BaseException as error:
        answer.set_exception(error)
