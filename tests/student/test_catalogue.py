"""Every loss of the catalogue in a whole training, from a cache that `distily-cache generate` made."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from student.cli import main
from student.objective.catalogue import EXACTNESS, NEEDS, catalogue
from student.objective.table import markdown, rows
from tests import teachers
from tests.student.caches import save_teacher

Run = Callable[..., tuple[int, str, str]]
PAGE = Path(__file__).parents[2] / "docs" / "objectives.md"
FLAGS = "--top-k 12 --top-p 0.7 --tail 16 --temperatures 2 --hidden-layers 1,2 --final --relation-layers 1"


@pytest.fixture(scope="session")
def full_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All column groups and the sidecar of a tiny teacher, captured by the transformers engine."""
    folder = tmp_path_factory.mktemp("full-cache")
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(teachers.WORDS, size=24).tolist()) for _ in range(32)]
    (folder / "corpus.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    command = [
        str(Path(sys.executable).parent / "distily-cache"),
        "generate",
        str(save_teacher(folder / "teacher")),
    ]
    command += [str(folder / "corpus.jsonl"), "--out", str(folder / "store"), "--engine", "transformers"]
    done = subprocess.run([*command, *FLAGS.split()], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "store"


@pytest.fixture
def learn(distily_train: Run, full_cache: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Twenty steps of an objective; the summary."""

    def run(objective: dict[str, Any], *arguments: object) -> dict[str, Any]:
        (tmp_path / "objective.yaml").write_text(yaml.safe_dump(objective))
        flags = ["--objective", tmp_path / "objective.yaml", "--max_steps", 20, "--learning-rate", 3e-3]
        flags += ["--per-device-train-batch-size", 8, "--eval-fraction", 0.2, "--report-to", "none"]
        flags += ["--student-model-config", '{"num_hidden_layers": 2}', "--init", "random"]
        flags += ["--eval_steps", 20, "--save_strategy", "no", "--disable_tqdm", "True", "--json"]
        code, out, err = distily_train(full_cache, "--output-dir", tmp_path / "out", *flags, *arguments)
        assert code == 0, err
        summary: dict[str, Any] = json.loads(out)
        return summary

    return run


@pytest.mark.parametrize("name", list(catalogue()))
def test_twenty_steps_reduce_the_loss_itself(name: str, learn: Callable[..., dict[str, Any]]) -> None:
    summary = learn({"terms": [{"loss": name}]})
    first, last = summary["first_eval"]["eval_loss"], summary["last_eval"]["eval_loss"]
    assert math.isfinite(first) and last < first, (first, last)


def test_a_ternary_student_learns_everything_at_once(learn: Callable[..., dict[str, Any]]) -> None:
    """All losses in one objective, those with a temperature at 2, balanced, with draws and without labels."""
    terms = [
        {"loss": name, **({"temperature": 2.0} if "temperature" in loss.options else {})}
        for name, loss in catalogue().items()
    ]
    bitnet = ("--student-model-as-bitnet", "--gradient_checkpointing", "True", "--bf16", "--max_steps", 8)
    summary = learn({"terms": terms, "balance": "gradient_norm"}, *bitnet)
    assert len(summary["objective"]) >= len(terms)
    assert summary["last_eval"]["eval_kl"] < summary["first_eval"]["eval_kl"]


def test_entries_are_well_formed() -> None:
    for name, loss in catalogue().items():
        assert set(loss.needs) | set(loss.better) <= set(NEEDS) and loss.exactness in EXACTNESS, name
        assert loss.formula and loss.statement and "\n" not in loss.formula + loss.statement, name
        for option, spec in loss.options.items():
            assert spec.check(spec.default, option) == spec.default, (name, option)
            assert spec.help, (name, option)


def test_the_page_shows_the_catalogue_as_it_is() -> None:
    page = PAGE.read_text()
    table = page[page.index("<!-- catalogue") :].split("-->\n", 1)[1].split("<!-- /catalogue -->")[0]
    assert table.strip() == markdown().strip(), "python -m student.objective.table prints the new tables"


def test_the_command_lists_them(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    for arguments in (["objectives"], ["objectives", "--json"]):
        monkeypatch.setattr(sys, "argv", ["distily-train", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code
        out = capsys.readouterr().out
        assert all(name in out for name in catalogue())
    assert json.loads(out) == rows()
