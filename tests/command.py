"""The command lines as tests run them: their own `main` in this process, or a process as a user starts it.

In this process nothing is replaced; Python, torch and transformers are only not loaded anew for each call.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pipeline.cli
import student.cli

MAINS = {"distily-cache": pipeline.cli.main, "distily-train": student.cli.main}
Done = subprocess.CompletedProcess[str]


def command(program: str, *arguments: object) -> list[str]:
    """What starts `program` as a process."""
    return [str(Path(sys.executable).parent / program), *map(str, arguments)]


def spawn(program: str, *arguments: object, code: int | None = 0, timeout: float = 600) -> Done:
    """Runs it as a process of its own; `code` is what it has to end with, None for anything."""
    started = command(program, *arguments)
    done = subprocess.run(started, capture_output=True, text=True, timeout=timeout, check=False)
    return _checked(done, code)


def fork(program: str, *arguments: object, stderr: Path) -> BaseProcess:
    """Starts it as a process forked from one that has loaded vLLM, and done nothing else: that takes each
    process 20 seconds of a core.

    stderr: a file for its standard error.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.pipeline.loaded"])
    started = context.Process(target=_main, args=([program, *map(str, arguments)], stderr))
    started.start()
    return started


def _main(words: list[str], stderr: Path) -> None:
    with stderr.open("w") as file:
        os.dup2(file.fileno(), 2)
    sys.argv = words
    MAINS[words[0]]()


def run_module(
    module: str, *arguments: object, variables: Mapping[str, str] | None = None, timeout: float = 600
) -> str:
    """What a program of the tests, `python -m MODULE ARGUMENTS` at the root of the project, prints.

    variables: to be set in its environment.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        capture_output=True,
        check=False,
        text=True,
        timeout=timeout,
        cwd=Path(__file__).parents[1],
        env=os.environ | dict(variables or {}),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def call(program: str, *arguments: object, code: int | None = 0) -> Done:
    """Runs it in this process; `code` is what it has to end with, None for anything."""
    words = [program, *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    ended = 0
    with patch.object(sys, "argv", words), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            MAINS[program]()
        except SystemExit as stop:
            ended = int(stop.code or 0)
    return _checked(Done(words, ended, out.getvalue(), err.getvalue()), code)


def cli(*arguments: object) -> tuple[int, str, str]:
    """`distily-cache ARGUMENTS` in this process: exit code, standard output, standard error."""
    done = call("distily-cache", *arguments, code=None)
    return done.returncode, done.stdout, done.stderr


def _checked(done: Done, code: int | None) -> Done:
    if code is not None:
        assert done.returncode == code, f"{done.args}\n{done.stderr[-3000:]}"
    return done


def generate(teacher: Path, data: Path, out: Path, *more: object) -> dict[str, Any]:
    """What `generate --json` prints, with the transformers engine, short samples and small shards."""
    flags = ("--engine", "transformers", "--max-seq-len", 64, "--shard-tokens", 256, "--json")
    done = call("distily-cache", "generate", teacher, data, "--out", out, *flags, *more)
    made: dict[str, Any] = json.loads(done.stdout)
    return made
