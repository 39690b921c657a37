"""Records of tasks in local files: the harness is given what they hold now, whatever they are called."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml

from student.evaluation.task_data import local


@dataclass(frozen=True)
class Entry:
    """What is read of an entry of the harness's index."""

    name: str
    cfg: dict[str, Any]
    yaml_path: Path


@pytest.mark.parametrize("folder", ["tasks", "tasks [v1] *", "a::b"])
def test_records_are_those_of_the_file_now(tmp_path: Path, folder: str) -> None:
    records = tmp_path / folder / "me" / "set"
    records.mkdir(parents=True)
    entry = Entry("task", {"dataset_path": "me/set", "test_split": "test"}, tmp_path / "task.yaml")
    for text in ("the old text", "the new text"):
        file = records / "test.jsonl"
        file.write_text(f'{{"text": "{text}"}}\n')
        os.utime(file, (1_000_000_000, 1_000_000_000))
        made = local(entry, tmp_path / folder, 0, tmp_path)
        task = yaml.safe_load(made.yaml_path.read_text())
        rows = datasets.load_dataset(task["dataset_path"], **task["dataset_kwargs"])
        assert rows["test"]["text"][:] == [text]
