"""The directory of a sweep: where things lie in it, and that one command at a time works there."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distily.checkpoint.configs import json_object
from student.errors import UserError
from student.sweep.runs import SweepRun
from student.training.resume import last_checkpoint

DONE = "sweep_run.json"  # in a run's directory once it has ended well: how long its process took


@dataclass(frozen=True)
class Home:
    """--out of a sweep."""

    path: Path

    @property
    def table(self) -> Path:
        return self.path / "sweep.json"

    @property
    def page(self) -> Path:
        return self.path / "sweep.html"

    @property
    def study(self) -> Path:
        """Optuna's trials."""
        return self.path / "search.db"

    def directory(self, run: SweepRun) -> Path:
        """--output-dir of a run: the one that has its flags already, whatever varied when it was named."""
        runs = self.path / "runs"
        return next(runs.glob(f"*-{run.key}"), runs / run.name)

    def log(self, run: SweepRun) -> Path:
        """What the run's process printed."""
        return self.path / "logs" / f"{self.directory(run).name}.log"

    def checkpointed(self, run: SweepRun) -> bool:
        """Whether the run has a checkpoint to resume from."""
        return last_checkpoint(self.directory(run)) is not None

    def finished(self, run: SweepRun) -> dict[str, Any] | None:
        """The record of a run that has ended well."""
        return read_json(self.directory(run) / DONE)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """UserError while another sweep works here, or where nothing can be written."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / "lock").open("w")
        except OSError as error:
            raise UserError(
                f"--out {self.path} cannot be written ({error.strerror}); choose another directory"
            ) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UserError(f"--out {self.path}: another sweep is at work there; wait for it") from error
            yield


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is none."""
    if not path.is_file():
        return None
    return json_object(path)
