"""What lies in an --output-dir is not overwritten unless it is asked for, and only what a training wrote."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from student.card import card

Train = Callable[..., dict[str, Any]]
Run = Callable[..., tuple[int, str, str]]
QUICK = ("--student-model-config", '{"num_hidden_layers": 1}', "--report-to", "none")
QUICK += ("--per-device-train-batch-size", "8", "--eval-fraction", "0.25")
RECIPE = "stages:\n  - {name: first, share: 0.5}\n  - {name: last, share: 0.5}\n"


def content(directory: Path) -> dict[str, str]:
    """Every file with the hash of its bytes."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): blake3(path.read_bytes()).hexdigest() for path in files}


def refused(run: Run, *arguments: object) -> str:
    code, _, err = run(*arguments)
    lines = [line for line in err.splitlines() if line.startswith("distily-train: ")]
    assert (code, len(lines)) == (2, 1), err
    return lines[0]


@pytest.mark.parametrize("save", [(), ("--save-strategy", "no")], ids=["checkpoints", "student"])
def test_a_run_is_not_overwritten_by_another(
    train: Train, distily_train: Run, cache: Path, tmp_path: Path, save: tuple[str, ...]
) -> None:
    train(tmp_path, *QUICK, "--max-steps", 1, *save)
    before = content(tmp_path)
    line = refused(distily_train, cache, "--output-dir", tmp_path, "--max-steps", 1, "--report-to", "none")
    assert "--output-dir" in line and "--overwrite-output-dir" in line and "--resume-from-checkpoint" in line
    assert content(tmp_path) == before


@pytest.mark.parametrize("flag", ["--overwrite-output-dir", "--overwrite_output_dir"])
def test_overwriting_leaves_nothing_of_the_run_before(train: Train, tmp_path: Path, flag: str) -> None:
    train(tmp_path, *QUICK, "--max-steps", 2, "--save-steps", 1)
    (tmp_path / "eval.json").write_text("{}")
    (tmp_path / "eval-samples.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    card(tmp_path)
    summary = train(tmp_path, *QUICK, "--max-steps", 1, "--save-strategy", "no", flag)
    assert summary["steps"] == 1
    assert not list(tmp_path.glob("checkpoint-*")) and not list(tmp_path.glob("eval*.json"))
    assert not (tmp_path / "README.md").exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("wrong", [("--learning-rate", "-1"), ("--hidden-loss", "mse", "--layer-map", "9:9")])
def test_nothing_is_deleted_for_a_request_that_is_refused(
    train: Train, distily_train: Run, cache: Path, tmp_path: Path, wrong: tuple[str, ...]
) -> None:
    train(tmp_path, *QUICK, "--max-steps", 1)
    before = content(tmp_path)
    refused(distily_train, cache, "--output-dir", tmp_path, *QUICK, "--overwrite-output-dir", *wrong)
    assert content(tmp_path) == before


def test_a_run_that_was_resumed_elsewhere_does_not_overwrite(
    train: Train, distily_train: Run, cache: Path, tmp_path: Path
) -> None:
    steps = (*QUICK, "--max-steps", 2, "--save-steps", 1)
    train(tmp_path / "one", *steps)
    train(tmp_path / "two", *QUICK, "--max-steps", 1, "--learning-rate", 1e-5)
    before = content(tmp_path / "two")
    checkpoint = tmp_path / "one" / "checkpoint-1"
    line = refused(
        distily_train, cache, "--output-dir", tmp_path / "two", *steps, "--resume-from-checkpoint", checkpoint
    )
    assert "--overwrite-output-dir" in line
    assert content(tmp_path / "two") == before
    train(tmp_path / "one", *steps, "--resume-from-checkpoint", checkpoint)  # its own directory


def test_what_overwriting_would_lose_is_named(
    train: Train, distily_train: Run, cache: Path, teacher: Path, tmp_path: Path
) -> None:
    """The student to start from, the checkpoint to resume, a model that is not of a training."""
    train(tmp_path, *QUICK, "--max-steps", 2, "--save-steps", 1)
    before, flags = content(tmp_path), ("--report-to", "none", "--overwrite-output-dir")
    line = refused(distily_train, cache, "--output-dir", tmp_path, "--student", tmp_path, *flags)
    assert "--student" in line
    line = refused(distily_train, cache, "--output-dir", tmp_path, *flags, "--resume-from-checkpoint", "True")
    assert "--resume-from-checkpoint" in line and "--overwrite-output-dir" in line
    assert content(tmp_path) == before
    before = content(teacher)
    line = refused(distily_train, cache, "--output-dir", teacher, *flags)
    assert "not a training" in line
    refused(distily_train, cache, "--output-dir", teacher, "--report-to", "none")
    assert content(teacher) == before


def test_a_cache_is_no_output_directory(distily_train: Run, cache: Path, tmp_path: Path) -> None:
    before = content(cache)
    for more in ((), ("--overwrite-output-dir",)):
        assert "is a cache" in refused(distily_train, cache, "--output-dir", cache, *QUICK, *more)
        inside = cache / "students" / "one"
        assert "lies in the cache" in refused(distily_train, cache, "--output-dir", inside, *QUICK, *more)
    assert content(cache) == before


def test_an_output_directory_with_other_files_is_used(train: Train, tmp_path: Path) -> None:
    """As is one with the logs of a run that ended before its first checkpoint: there is nothing to lose."""
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "runs").mkdir()
    (tmp_path / "checkpoint-1").mkdir()
    train(tmp_path, *QUICK, "--max-steps", 1)


def test_stages_do_not_overwrite_another_training(
    train: Train, distily_train: Run, cache: Path, tmp_path: Path
) -> None:
    out, recipe = tmp_path / "out", tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    train(out, *QUICK, "--max-steps", 1, "--save-strategy", "no")
    before = content(out)
    words = (cache, "--output-dir", out, "--recipe", recipe, *QUICK, "--max-steps", 2)
    words += ("--save-strategy", "no", "--init", "random")
    assert "--overwrite-output-dir" in refused(distily_train, *words)
    assert content(out) == before
    assert distily_train(*words, "--overwrite-output-dir")[0] == 0
    assert json.loads((out / "stage.json").read_text())["finished"]
    first = content(out / "first")["model.safetensors"]
    assert distily_train(*words, "--seed", "1", "--overwrite-output-dir")[0] == 0
    assert content(out / "first")["model.safetensors"] != first


def test_a_card_that_was_edited_is_kept(trained: Path, distily: Run, tmp_path: Path) -> None:
    run, card = tmp_path / "run", tmp_path / "run" / "README.md"
    shutil.copytree(trained, run)
    assert distily("card", run)[0] == 0
    first = card.read_bytes()
    assert distily("card", run, "--license", "mit")[0] == 0  # its own is replaced
    edited = card.read_text().replace("# ", "# My ", 1)
    for text in (edited, "# Mine\n"):
        card.write_text(text)
        assert "--overwrite" in refused(distily, "card", run)
        assert card.read_text() == text
    assert distily("card", run, "--overwrite")[0] == 0
    assert card.read_bytes() == first


def test_a_report_replaces_reports_only(trained: Path, distily: Run, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    for _ in range(2):
        assert distily("report", trained, "--out", page)[0] == 0
    page.write_text("<html>mine</html>")
    assert "no report" in refused(distily, "report", trained, "--out", page)
    assert page.read_text() == "<html>mine</html>"
    line = refused(distily, "report", trained, "--out", trained / "summary.json")
    assert "no report" in line and json.loads((trained / "summary.json").read_text())
