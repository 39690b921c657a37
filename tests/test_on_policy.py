"""examples/on_policy.sh as it is: a round on a tiny teacher, with the student of the round before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from featurestore.format.written import piece_names, read_piece
from featurestore.maintenance.verify import verify_store
from featurestore.reader import CacheReader
from featurestore.storage.local import LocalRoot
from pipeline.teacher.checkpoint import load_teacher
from tests.pipeline.writing import corpus, teacher

pytestmark = pytest.mark.examples
SCRIPT = Path(__file__).parents[1] / "examples" / "on_policy.sh"


def on_policy(model: Path, data: Path, run: Path, rounds: int) -> str:
    small = {"ENGINE": "transformers", "SAMPLES": "8", "STEPS": "2", "LAYERS": "2", "ROUNDS": str(rounds)}
    environment = os.environ | small | {"VENV": str(Path(sys.executable).parents[1])}
    command = [str(SCRIPT), str(model), str(data), str(run)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("on-policy")
    on_policy(teacher(folder / "teacher"), corpus(folder / "corpus.jsonl"), folder / "run", rounds=1)
    return folder / "run"


def test_each_round_writes_with_the_student_of_the_last_and_learns_from_all(finished: Path) -> None:
    root = LocalRoot(finished / "cache")
    writers = {spec.digest: texts for spec, texts in (read_piece(root, name) for name in piece_names(root))}
    students = [load_teacher(str(finished / f"round-{number}")).digest for number in range(2)]
    assert set(writers) == {students[0]} and len(set(students)) == 2
    summaries = [
        json.loads((finished / f"round-{number}" / "summary.json").read_text()) for number in range(2)
    ]
    sizes = [len(CacheReader.open(finished / "cache", summary["manifest"])) for summary in summaries]
    assert sizes[0] == 8 < sizes[1] == len(CacheReader.open(finished / "cache"))
    assert verify_store(finished / "cache", deep=True).sound


def test_run_again_it_does_nothing(finished: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in finished.rglob("*") if file.is_file()}
    log = on_policy(finished.parent / "teacher", finished.parent / "corpus.jsonl", finished, rounds=1)
    assert "starting" not in log and log.count("nothing to generate") == 2
    assert {file: file.stat().st_mtime_ns for file in finished.rglob("*") if file.is_file()} == before
