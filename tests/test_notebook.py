"""The teaching notebook runs, and its committed outputs are of its committed cells."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

from featurestore.format.schema import HiddenSpec, LogitsSpec
from scripts.run_notebook import NOTEBOOK, code_cells, executed, source_digest
from tests.student.caches import random_samples, save_teacher, write_cache

MAX_BYTES = 100_000


def test_the_committed_outputs_are_of_the_committed_cells() -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < MAX_BYTES
    cells = code_cells(nbformat.read(NOTEBOOK, as_version=4))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert cell.metadata["executed"] == source_digest(cell), "run scripts/run_notebook.py again"
        assert all(output.output_type != "error" for output in cell.outputs)
        assert all(output.get("name") != "stderr" for output in cell.outputs)
    machine = r"(?<![\w.~>])/(?:home|root|tmp|usr|opt|work|var|Users|mnt)/"
    assert not re.findall(machine, text), "an absolute path of some machine"


@pytest.mark.examples
def test_it_runs_on_another_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = save_teacher(tmp_path / "teacher")
    # Long enough that eight steps lower the KL by far more than another machine's random teacher changes it.
    samples = random_samples(300, 199, lengths=(60, 120), seed=1)
    cache = write_cache(tmp_path / "cache", teacher, samples, [LogitsSpec(16), HiddenSpec(1, "bf16")])
    monkeypatch.setenv("DISTILY_NOTEBOOK_CACHE", str(cache))
    notebook = executed(NOTEBOOK, timeout=300)
    printed = [output.text for output in code_cells(notebook)[-1].outputs if output.output_type == "stream"]
    rows = dict(re.findall(r"^\(?([a-z ]+?)\)? +([\d.]+) +[\d.]+$", "".join(printed), flags=re.M))
    assert set(rows) == {"teacher", "labels", "untrained", "the teacher"}
    assert float(rows["teacher"]) < float(rows["untrained"])
