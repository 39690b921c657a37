"""SIGINT and SIGTERM: one line, the exit code, no process left, within seconds also in one long operation."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from distily.system.stopping import Stopped, stoppable

# The promise is 5 seconds; a machine that runs other tests on all of its cores may schedule us later.
SECONDS = 10.0
STOPS = [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")]
PROGRAM = """
import hashlib, subprocess, sys, time
from distily.system.stopping import advise, stoppable

def tidy():
    while True:
        time.sleep(0.1)

def one_long_operation():
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)

def swallows():
    while True:
        try:
            tidy()
        except BaseException:
            continue

with stoppable("program"):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    advise("this is kept")
    print(child.pid, flush=True)
    globals()[sys.argv[1]]()
"""


def start(what: str) -> tuple[subprocess.Popen[str], psutil.Process]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, what],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        # Whoever runs the tests in the background may have it ignored, and a program would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509  (takes no lock)
    )
    assert process.stdout is not None
    child = psutil.Process(int(process.stdout.readline()))
    time.sleep(0.3)  # into the operation
    return process, child


@pytest.mark.parametrize(("number", "word"), STOPS)
@pytest.mark.parametrize("what", ["one_long_operation", "swallows"])
def test_what_does_not_listen_is_ended(number: signal.Signals, word: str, what: str) -> None:
    process, child = start(what)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=SECONDS)
    assert stderr == f"program: {word}; this is kept\n"
    assert process.returncode == 128 + number
    assert not psutil.wait_procs([child], timeout=SECONDS)[1]


@pytest.mark.parametrize(("number", "word"), STOPS)
def test_what_listens_ends_by_itself(number: signal.Signals, word: str) -> None:
    process, child = start("tidy")
    began = time.monotonic()
    process.send_signal(number)
    _, stderr = process.communicate(timeout=SECONDS)
    assert stderr == f"program: {word}; this is kept\n"
    assert process.returncode == 128 + number
    assert time.monotonic() - began < 2.5  # before the watch would
    assert not psutil.wait_procs([child], timeout=SECONDS)[1]


def test_a_signal_that_the_parent_ignores_stays_ignored() -> None:
    """A shell starts what is to run in the background so."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "tidy"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),  # noqa: PLW1509
    )
    assert process.stdout is not None
    child = psutil.Process(int(process.stdout.readline()))
    process.send_signal(signal.SIGINT)
    time.sleep(1.0)
    assert process.poll() is None
    process.terminate()
    assert process.wait(timeout=SECONDS) == 143
    assert not psutil.wait_procs([child], timeout=SECONDS)[1]


def test_what_was_started_before_the_command_stays() -> None:
    """A program that calls a command, as these tests do, keeps its own processes."""
    earlier = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    with pytest.raises(SystemExit) as ended, stoppable("program"):
        started = psutil.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
        raise Stopped(signal.SIGTERM)
    assert ended.value.code == 143
    assert not psutil.wait_procs([started], timeout=SECONDS)[1]
    assert earlier.poll() is None
    earlier.kill()
    earlier.wait()


def test_a_forked_process_has_its_own_signals() -> None:
    """A worker that is told to end does not end the command that started it."""
    program = """
import multiprocessing, os, signal, time
from distily.system.stopping import stoppable

def work():
    time.sleep(100)

with stoppable("program"):
    worker = multiprocessing.get_context("fork").Process(target=work)
    worker.start()
    time.sleep(0.3)
    worker.terminate()
    worker.join()
    time.sleep(4.5)
    print(worker.exitcode)
"""
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.returncode) == ("-15\n", 0), done.stderr


PRINTS = """
import sys, typer
from rich.console import Console
from distily.system.stopping import stoppable

app = typer.Typer(pretty_exceptions_enable=False)

@app.command()
def main(how: str, lines: int):
    say = {"echo": typer.echo, "print": print, "rich": Console().print}[how]
    for _ in range(lines):
        say("one more line")

@app.command()
def elsewhere():
    raise BrokenPipeError("of a worker")

@app.command()
def silent():
    pass

with stoppable("program"):
    app()
"""


def without_a_reader(*words: str) -> subprocess.CompletedProcess[str]:
    """Run PRINTS with a standard output that nobody reads, as behind `| head -0`."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        return subprocess.run(
            [sys.executable, "-c", PRINTS, *words],
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
            cwd=Path(__file__).parents[2],
        )
    finally:
        os.close(writing)


@pytest.mark.parametrize("lines", ["1", "20000"])
@pytest.mark.parametrize("how", ["echo", "print", "rich"])
def test_a_closed_pipe_ends_it_without_a_word(how: str, lines: str) -> None:
    done = without_a_reader("main", how, lines)
    assert (done.stderr, done.returncode) == ("", 141)


def test_a_silent_command_needs_no_reader() -> None:
    done = without_a_reader("silent")
    assert (done.stderr, done.returncode) == ("", 0)


def test_a_broken_pipe_elsewhere_stays_an_error() -> None:
    words = [sys.executable, "-c", PRINTS, "elsewhere"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert "of a worker" in done.stderr
    assert done.returncode == 1
