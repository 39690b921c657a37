"""Runs that Optuna chooses; its trials are kept in the sweep's directory, so that a search resumes."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from featurestore.identity import canonical_json, digest
from student.errors import UserError
from student.sweep.runs import SweepRun, chosen, seeded
from student.sweep.spec import Range, SweepAxis, SweepSpec


class Searched:
    """The runs of the trials, those of earlier commands first. value: the metric of a finished run.

    A trial is told the mean over its seeds once all of them have ended, and has failed where one of them has.
    Each trial has a sampler of its own, seeded by its number, so that a search that was interrupted and ran
    one after the other goes on as it would have.
    """

    def __init__(
        self, spec: SweepSpec, manifest: str, storage: Path, value: Callable[[SweepRun], float | None]
    ) -> None:
        assert spec.search is not None
        self._optuna = _import()
        self._spec, self._search, self._value = spec, spec.search, value
        self._study = self._optuna.create_study(
            storage=f"sqlite:///{storage}",
            study_name=_identity(spec, manifest),
            direction=spec.direction,
            load_if_exists=True,
        )
        self._ready: deque[SweepRun] = deque()
        self._open: dict[int, list[SweepRun]] = {}  # the runs of a trial that have not ended
        self._failed: set[int] = set()
        self._owners: dict[str, list[int]] = {}  # the trials that wait for a run, by its key
        self.runs: list[SweepRun] = []  # all so far
        self._trials = 0
        for trial in self._study.get_trials(deepcopy=False):
            if {axis.name for axis in self._search.space} <= set(trial.params):
                self._add(trial.number, trial.params)  # of others the command was killed while it asked

    def next(self) -> SweepRun | None:
        """A run of a trial that has begun, else of a new one; None when there are as many as there may be."""
        while not self._ready:
            if self._trials >= self._search.trials:
                return None
            seed = self._search.seed + self._trials
            self._study.sampler = self._optuna.samplers.TPESampler(seed=seed)
            trial = self._study.ask()
            for axis in self._search.space:
                _suggest(trial, axis)
            self._add(trial.number, trial.params)
        return self._ready.popleft()

    def ended(self, run: SweepRun, failure: str | None) -> None:
        """Tells the study, where a trial ends with it."""
        for number in self._owners.pop(run.key, []):
            left = self._open[number]
            left.remove(run)
            if failure:
                self._failed.add(number)
            if not left:
                self._tell(number)

    def _add(self, number: int, params: Mapping[str, Any]) -> None:
        """The runs of a trial; those that another one has asked for already are not run again."""
        self._trials += 1
        runs = seeded(self._spec, [chosen(axis, params[axis.name]) for axis in self._search.space])
        self._open[number] = list(runs)
        for run in runs:
            if run.key not in self._owners:
                self._ready.append(run)
            self._owners.setdefault(run.key, []).append(number)
        known = {run.key for run in self.runs}
        self.runs += [run for run in runs if run.key not in known]

    def _tell(self, number: int) -> None:
        states = self._optuna.trial.TrialState
        trial = self._study.get_trials(deepcopy=False)[number]
        if trial.state != states.RUNNING:
            return
        runs = seeded(self._spec, [chosen(axis, trial.params[axis.name]) for axis in self._search.space])
        values = [value for value in map(self._value, runs) if value is not None]
        if number in self._failed or not values:
            self._study.tell(number, state=states.FAIL)
        else:
            self._study.tell(number, sum(values) / len(values))


def _suggest(trial: Any, axis: SweepAxis | Range) -> None:
    if isinstance(axis, SweepAxis):
        trial.suggest_categorical(axis.name, list(axis.choices))
    elif isinstance(axis.low, int) and isinstance(axis.high, int):
        trial.suggest_int(axis.name, axis.low, axis.high, log=axis.log)
    else:
        trial.suggest_float(axis.name, axis.low, axis.high, log=axis.log)


def _identity(spec: SweepSpec, manifest: str) -> str:
    """Trials of another base, space or metric are not mistaken for those of this one; more trials are the
    same search.
    """
    content = {name: value for name, value in spec.content.items() if name != "search"}
    search = {name: value for name, value in spec.content["search"].items() if name != "trials"}
    plain = json.loads(json.dumps({**content, "search": search}, default=str))
    return digest(canonical_json([plain, manifest]), 16)


def _import() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise UserError("`search` needs optuna; install it (the extra [sweep]), or write a `grid`") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
