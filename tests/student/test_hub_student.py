"""A student that is downloaded: the weights that are loaded, and the tokenizer that is compared."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from featurestore.reader import CacheReader
from student.config.flags import StudentOptions
from student.errors import UserError
from student.modeling.plan import plan_student
from tests import checkpoints
from tests.checkpoints import INDEX, WEIGHTS, copy_of
from tests.hub import Hub

REPO = "me/student"
BESIDE = ("consolidated.safetensors", "model.fp16.safetensors", "original/model.safetensors", "own.py")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with Hub().running() as running:
        yield running


def upload(hub: Hub, directory: Path) -> None:
    files = {file.name: file.read_bytes() for file in directory.iterdir() if file.is_file()}
    hub.repos[f"models/{REPO}"] = files | dict.fromkeys(BESIDE, b"other weights")


@pytest.mark.parametrize("sharded", [False, True])
def test_the_weights_that_are_loaded_come(
    hub: Hub, teacher: Path, cache: Path, tmp_path: Path, sharded: bool
) -> None:
    directory = copy_of(teacher, tmp_path / "student")
    weights = {file.name for file in checkpoints.shard(directory)} if sharded else {WEIGHTS}
    upload(hub, directory)
    reader = CacheReader.open(cache)
    student, _ = plan_student(StudentOptions(student=REPO), reader).build()
    got = {path.rpartition("/")[2] for _, path in hub.requests if path.endswith((".safetensors", ".py"))}
    assert got == weights
    local, _ = plan_student(StudentOptions(student=str(directory)), reader).build()
    own, theirs = student.state_dict(), local.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in own.items())


def test_another_tokenizer_or_half_a_model_is_refused(
    hub: Hub, teacher: Path, cache: Path, tmp_path: Path
) -> None:
    reader, directory = CacheReader.open(cache), copy_of(teacher, tmp_path / "student")
    parsed = json.loads((reader.teacher_dir / "tokenizer.json").read_text())
    vocabulary = parsed["model"]["vocab"]
    vocabulary["more"] = 199  # a token that the model does not have
    (directory / "tokenizer.json").write_text(json.dumps(parsed))
    upload(hub, directory)
    with pytest.raises(
        UserError,
        match=r"--student me/student: the student's vocabulary has 199 tokens, and its tokenizer 200",
    ):
        plan_student(StudentOptions(student=REPO), reader)
    checkpoints.shard(directory)
    (directory / INDEX).write_text("{")
    upload(hub, directory)
    with pytest.raises(UserError, match=r"--student me/student: .*is not an index"):
        plan_student(StudentOptions(student=REPO), reader)
    with pytest.raises(UserError, match=r"--student me/none: neither"):
        plan_student(StudentOptions(student="me/none"), reader)
