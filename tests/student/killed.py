"""`python -m tests.student.killed OUT FILES ARGS`: starts `distily-train ARGS` once for each of FILES, and
kills it with SIGKILL as soon as that file is in OUT/blockwise.

Each is forked from this process, which has imported what they need and has computed nothing.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import student.training.run
from student.cli import main

assert student.training.run  # imported by the command only when it is called


def start(words: list[str]) -> int:
    """The process's id."""
    process = os.fork()
    if process == 0:
        sys.argv = ["distily-train", *words]
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        main()
        os._exit(3)
    return process


if __name__ == "__main__":
    folder = Path(sys.argv[1]) / "blockwise"
    for name in sys.argv[2].split(","):
        child = start(sys.argv[3:])
        while not (folder / name).is_file():
            assert os.waitpid(child, os.WNOHANG) == (0, 0), f"it ended before there was {name}"
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        assert not (folder / "block-003.json").is_file()
