"""The process of one run: `distily-train from-cache` in a process that has torch and transformers loaded.

Importing this module is what makes it so: the fork server of `student.sweep.running` does, and each run is
a fork of that server, which has run nothing and touched no device.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from distily.errors import DistilyError
from distily.safety.redaction import redact_words
from distily.system.files import write_json
from distily.text import one_line
from student.config.parser import parse
from student.errors import exit_code
from student.sweep.home import DONE
from student.training.run import train_from_cache


@dataclass(frozen=True, kw_only=True)
class RunJob:
    """words: after `distily-train from-cache`; threads: of torch; gpu: CUDA_VISIBLE_DEVICES of the process,
    or None.
    """

    words: list[str]
    directory: Path
    log: Path
    threads: int
    gpu: str | None
    resumed: bool


def work(job: RunJob) -> None:
    """Train; ends this process with the exit code of the command."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the sweep ends its own
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with job.log.open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if job.gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = job.gpu
    torch.set_num_threads(job.threads)
    words, began = ["distily-train", "from-cache", *job.words], time.time()
    print(f"--- {' '.join(redact_words(words))}", flush=True)  # noqa: T201
    try:
        train_from_cache(parse(job.words), words)
    except DistilyError as error:
        sys.stderr.write(f"distily-train: {one_line(error, None)}\n")
        sys.exit(exit_code(error))
    record = {"seconds": round(time.time() - began, 3), "resumed": job.resumed}
    write_json(job.directory / DONE, record)


def _end_with_parent() -> None:
    """A sweep that was killed leaves no training behind, which the next one would start again beside it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
