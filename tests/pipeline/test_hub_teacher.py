"""A teacher that is downloaded: what comes of a repository, and that it is of one commit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from pipeline.errors import RequestError
from pipeline.teacher.checkpoint import load_teacher
from tests import checkpoints, teachers
from tests.checkpoints import INDEX, WEIGHTS
from tests.hub import Hub, sha_of

REPO = "me/teacher"
KEY = f"models/{REPO}"
# What repositories hold beside the model: other formats, precisions and conversions of it.
BESIDE = (
    "consolidated.safetensors",
    "model.fp16.safetensors",
    "original/model.safetensors",
    "pytorch_model.bin",
    "onnx/model.onnx",
)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with Hub().running() as running:
        yield running


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = teachers.llama(tmp_path / "teacher")
    (made / "modeling_own.py").write_text("raise SystemExit('ran')\n")
    return made


def upload(hub: Hub, directory: Path) -> None:
    files = {file.name: file.read_bytes() for file in directory.iterdir()}
    hub.repos[KEY] = files | dict.fromkeys(BESIDE, b"other weights")


def downloaded(path: Path) -> set[str]:
    return {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("code", [False, True])
def test_what_is_used_comes_and_nothing_else(hub: Hub, directory: Path, sharded: bool, code: bool) -> None:
    weights = {WEIGHTS}
    if sharded:
        weights = {file.name for file in checkpoints.shard(directory)} | {INDEX}
    upload(hub, directory)
    teacher = load_teacher(REPO, trust_remote_code=code)
    small = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert downloaded(teacher.path) == small | weights | ({"modeling_own.py"} if code else set())
    assert teacher.digest == load_teacher(str(directory)).digest


def test_all_of_it_is_of_one_commit(hub: Hub, directory: Path) -> None:
    """The branch is asked for once; a second time it might be elsewhere."""
    upload(hub, directory)
    assert load_teacher(REPO).path.name == sha_of(hub.repos[KEY])
    asked = [path for _, path in hub.requests if path.startswith("/api/models")]
    assert sum(path.endswith("/main") for path in asked) == 1, asked
    assert any(path.endswith(sha_of(hub.repos[KEY])) for path in asked)


def test_config_and_tokenizer_alone(hub: Hub, directory: Path) -> None:
    upload(hub, directory)
    assert not list(load_teacher(REPO, with_weights=False).path.glob("*.safetensors"))


def test_what_the_hub_does_not_give(hub: Hub, directory: Path) -> None:
    with pytest.raises(RequestError, match="nor a model that the hub gives"):
        load_teacher("me/nothing")
    checkpoints.shard(directory)
    (directory / INDEX).write_text("{")
    upload(hub, directory)
    with pytest.raises(RequestError, match=r"TEACHER me/teacher: .*is not an index"):
        load_teacher(REPO)
