"""SIGINT and SIGTERM end a command within seconds, with one line, also in the middle of a long computation.

Python runs a signal's handler between two bytecodes, so that a matrix product of a minute would delay it by a
minute. A thread of its own therefore watches for signals: if the command has not ended a few seconds after
the first one, the thread kills the processes that it started and ends it.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

import psutil

GRACE_SECONDS = 3.0
_STDOUT = 1
_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


class Stopped(BaseException):
    """The command was told to end. Not an Exception, and not a KeyboardInterrupt, which click swallows."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class _Line:
    """The last line of a stopped command, printed once, whoever comes first."""

    def __init__(self, program: str) -> None:
        self._program, self._printed = program, threading.Lock()
        self.advice = ""

    def print(self, number: int) -> None:
        if self._printed.acquire(blocking=False):
            advice = f"; {self.advice}" if self.advice else ""
            with suppress(OSError, ValueError):
                sys.stderr.write(f"{self._program}: {_WORDS[signal.Signals(number)]}{advice}\n")
                sys.stderr.flush()


_current: _Line | None = None


def advise(text: str) -> None:
    """What the line of a stopped command says from now on: what is kept, and how to continue from there."""
    if _current is not None:
        _current.advice = text


@contextmanager
def stoppable(program: str) -> Iterator[None]:
    """The main function of a command: a signal ends it with one line and the exit code 128 + its number.

    So does a reader of its standard output that goes away, as in `distily-cache info STORE | head`: the exit
    code is 141, as for SIGPIPE, and nothing is printed.

    Raises:
        SystemExit: the command was stopped, has tidied up behind it, and none of its processes is left.

    Example: `with stoppable("distily-cache"): app()`
    """
    with _until_nobody_reads(), _until_a_signal(program):
        yield


@contextmanager
def _until_nobody_reads() -> Iterator[None]:
    """SIGPIPE itself stays ignored, since it would also come from the sockets of an object store or a worker.

    click and rich turn the error into an exit with code 1; what was too short to fail while it was printed
    fails when it is flushed.
    """
    if sys.stdout is not sys.__stdout__ or sys.stdout is None:
        yield  # closed from the start, or somebody else's
        return
    with os.fdopen(os.dup(_STDOUT), "wb", buffering=0) as stdout:  # rich puts another file in its place
        try:
            try:
                yield
            finally:
                sys.stdout.flush()
        except (BrokenPipeError, SystemExit) as error:
            broken = error if isinstance(error, BrokenPipeError) else error.__context__
            if not isinstance(broken, BrokenPipeError) or not _unread(stdout.fileno()):
                raise
            with Path(os.devnull).open("wb") as nowhere:
                os.dup2(nowhere.fileno(), _STDOUT)  # what is still buffered is flushed when Python ends
            raise SystemExit(128 + signal.SIGPIPE) from None


def _unread(descriptor: int) -> bool:
    """Whether nobody is left who could read this pipe."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


@contextmanager
def _until_a_signal(program: str) -> Iterator[None]:
    global _current  # noqa: PLW0603
    if threading.current_thread() is not threading.main_thread():
        yield  # signals go to the main thread, and so does what they end
        return
    line = _current = _Line(program)
    others = _children()
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    threading.Thread(target=_watch, args=(ours, line, others), daemon=True, name="stopping").start()
    before_fd = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    # What our parent has us ignore, as a shell does for a command in the background, stays ignored.
    numbers = [number for number in _WORDS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, _stop) for number in numbers}
    try:
        yield
    except Stopped as stopped:
        _end_children(others)
        line.print(stopped.number)
        raise SystemExit(128 + stopped.number) from None
    finally:
        signal.set_wakeup_fd(before_fd)
        for number, handler in before.items():
            signal.signal(number, handler)
        _current = None
        theirs.close()


def _stop(number: int, _frame: FrameType | None) -> NoReturn:
    raise Stopped(number)


def _watch(signals: socket.socket, line: _Line, others: Collection[psutil.Process]) -> None:
    """End the process if it has not ended by itself a few seconds after its first signal."""
    with signals:
        while heard := signals.recv(1):
            if heard[0] in _WORDS and signal.getsignal(heard[0]) is _stop:
                break
        else:
            return  # the command ended without a signal
    time.sleep(GRACE_SECONDS)
    line.print(heard[0])
    _end_children(others)
    os._exit(128 + heard[0])


def _forget() -> None:
    """In a process that was forked: signals are its own, and are not told to the command's watch."""
    if _current is not None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget)


def _children() -> frozenset[psutil.Process]:
    return frozenset(psutil.Process().children(recursive=True))


def _end_children(others: Collection[psutil.Process]) -> None:
    """Kill every process that the command has started, and those that they have started.

    others: the processes that were there before the command; a program that calls it keeps them.
    """
    for child in _children().difference(others):
        with suppress(psutil.Error):
            # It removes what the others leave behind, and ends when they have.
            if not any("resource_tracker" in word for word in child.cmdline()):
                child.kill()
