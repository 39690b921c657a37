"""Real sweeps through the command line: killed and gone on with, grown, failing, searched."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml

from student.sweep.runs import expand
from student.sweep.spec import parse
from tests import html
from tests.command import command

Distily = Callable[..., tuple[int, str, str]]
BASE = {
    "max-steps": 4,
    "save-steps": 2,
    "eval-strategy": "no",
    "per-device-train-batch-size": 4,
    "eval-fraction": 0.25,
    "report-to": "none",
    "student-model-config": {"num_hidden_layers": 1},
}
GRID = {
    "learning-rate": [1e-3, 1e-2],
    "top-k": [4, None],
    "hidden": {"none": {}, "cosine": {"hidden-loss": "cosine"}},
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def to_file(**content: Any) -> Path:
        file = tmp_path / "spec.yaml"
        file.write_text(yaml.safe_dump({"base": BASE, **content}, sort_keys=False))
        return file

    return to_file


def starts(out: Path) -> dict[str, int]:
    """How many processes each run has had, by its directory."""
    return {log.stem: log.read_text().count("--- distily-train") for log in (out / "logs").glob("*.log")}


def table(out: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((out / "sweep.json").read_text())
    return read


def finished(out: Path) -> set[str]:
    return {path.parent.name for path in out.glob("runs/*/sweep_run.json")}


def test_a_killed_sweep_goes_on(
    distily: Distily, cache: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    spec = write(grid=GRID)
    arguments = ["sweep", cache, spec, "--out", out, "--jobs", 2]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command("distily-train", *arguments),
        start_new_session=True,
        env=environment,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 200
    while len(finished(out)) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before, started = finished(out), starts(out)
    assert 3 <= len(before) < 8

    code, printed, err = distily(*arguments, "--json")
    assert code == 0, err
    report = json.loads(printed)
    assert report == table(out)
    assert [run["state"] for run in report["runs"]] == ["finished"] * 8
    assert {run["name"] for run in report["runs"]} == finished(out)
    again = starts(out)
    assert all(again[name] == 1 for name in before)
    assert all(count == started.get(name, 0) + 1 for name, count in again.items() if name not in before)
    values = [run["metrics"]["eval_kl"] for run in report["runs"]]
    assert values == sorted(values)
    check_report(report, cache)
    page = html.page((out / "sweep.html").read_text())
    assert page.texts["figcaption"] == [
        "eval_kl by learning-rate",
        "eval_kl by top-k",
        "eval_kl by hidden",
        "eval_kl by seconds",
    ]

    victim = report["runs"][0]  # as if it had been killed after its first checkpoint
    directory = Path(victim["output_dir"])
    (directory / "sweep_run.json").unlink()
    shutil.rmtree(directory / "checkpoint-4")
    grown = write(grid={**GRID, "top-k": [4, None, 8]})
    # As many at once as before: the number of threads would show in the last digits, and Adam enlarges them.
    code, printed, err = distily("sweep", cache, grown, "--out", out, "--jobs", 2, "--json")
    assert code == 0, err
    runs = {run["name"]: run for run in json.loads(printed)["runs"]}
    assert len(runs) == 12
    assert {name: starts(out)[name] - again[name] for name in again} == {
        name: int(name == victim["name"]) for name in again
    }
    assert runs[victim["name"]]["resumed"] is True
    assert runs[victim["name"]]["metrics"]["eval_kl"] == pytest.approx(victim["metrics"]["eval_kl"], rel=1e-4)


def check_report(report: dict[str, Any], cache: Path) -> None:
    assert (report["version"], report["store"], report["spec"]["grid"]) == (1, str(cache), GRID)
    for run in report["runs"]:
        summary = json.loads((Path(run["output_dir"]) / "summary.json").read_text())
        assert (summary["manifest"], summary["steps"]) == (report["manifest"], 4)
        assert summary["command"][:3] == ["distily-train", "from-cache", str(cache)]
        assert run["output_dir"] in summary["command"]
        assert run["metrics"]["eval_kl"] == summary["last_eval"]["eval_kl"]
        assert run["seconds"] >= summary["seconds"] > 0
        cost = summary["cache_cost"]
        spared = min(summary["tokens"], cost["tokens"]) * cost["capture_seconds"] / cost["tokens"]
        assert run["generation_seconds"] == pytest.approx(spared, abs=0.06)


def test_a_failing_run_stands_in_the_table(
    distily: Distily, cache: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    content = {"base": BASE, "grid": {"learning-rate": [1e-3, 1e-2]}}
    bad = expand(parse(content, "spec"))[0]
    (out / "runs" / bad.name / "config.json").mkdir(parents=True)  # where the student's has to go
    arguments = ["sweep", cache, write(**content), "--out", out, "--json"]
    code, printed, _ = distily(*arguments)
    assert code == 1
    good, failed = json.loads(printed)["runs"]
    assert (good["state"], failed["state"], failed["name"]) == ("finished", "failed", bad.name)
    assert "config.json" in failed["reason"] and "\n" not in failed["reason"]
    assert "Failures" in html.page((out / "sweep.html").read_text()).texts["h2"]
    (out / "runs" / bad.name / "config.json").rmdir()
    code, printed, _ = distily(*arguments)
    assert code == 0
    assert starts(out)[Path(good["output_dir"]).name] == 1


def test_bad_sweeps_are_refused_before_anything_runs(
    refused: Callable[..., str], cache: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def line(*more: object, **content: Any) -> str:
        said = refused("sweep", cache, write(**content), "--out", out, *more)
        assert not out.exists()
        return said

    assert "no flag" in line(grid={"-x": [1]})
    assert "did you mean --learning-rate?" in line(grid={"learning-rat": [1e-3]})
    assert "top-k=99" in (said := line(grid={"top-k": [4, 99]})) and "holds top-k 16" in said
    assert "hidden=x" in line(grid={"hidden": {"x": {"hidden-loss": "mse", "hidden-layers": "2"}}})
    assert "--eval-fraction" in line(grid={"eval-fraction": [0]})
    assert "--jobs" in line("--jobs", 0, grid={"top-k": [4]})
    space = {"top-k": {"low": 4, "high": 99}}
    assert "top-k=99" in line(search={"trials": 2, "space": space})
    assert "cannot be read" in refused("sweep", cache, tmp_path / "none.yaml", "--out", out)


def test_a_search_goes_on(distily: Distily, cache: Path, write: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    space = {"learning-rate": {"low": 1e-4, "high": 1e-1, "log": True}, "top-k": {"choices": [2, 16]}}

    def search(trials: int) -> list[dict[str, Any]]:
        spec = write(search={"trials": trials, "space": space}, metric="eval_top1_agreement")
        code, printed, err = distily("sweep", cache, spec, "--out", out, "--json", "--jobs", 1)
        assert code == 0, err
        runs: list[dict[str, Any]] = json.loads(printed)["runs"]
        return runs

    first = {run["name"] for run in search(2)}
    storage = f"sqlite:///{out / 'search.db'}"
    (name,) = optuna.get_all_study_names(storage)
    study = optuna.load_study(study_name=name, storage=storage)
    trial = study.ask()  # as a command that was killed has left it
    trial.suggest_float("learning-rate", 1e-4, 1e-1, log=True)
    trial.suggest_categorical("top-k", ["2", "16"])
    runs = search(3)
    assert len(runs) == 3 and first < {run["name"] for run in runs}
    assert set(starts(out).values()) == {1}
    values = [run["metrics"]["eval_top1_agreement"] for run in runs]
    assert values == sorted(values, reverse=True)
    told = {trial.state.name for trial in study.get_trials()}
    assert told == {"COMPLETE"}
    assert study.best_value == values[0]
