"""push_student, against the stand-in of the hub's HTTP API."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from distily.errors import HubError
from student.card.push import push_student
from student.errors import UserError
from tests.hub import Hub
from tests.student.test_card import SUMMARY, made

SENT = {
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
    "vocab.txt",
    "README.md",
    "loss.svg",
    "loss.png",
}
KEPT = {
    "checkpoint-4/model.safetensors",
    "checkpoint-4/config.json",
    "checkpoint-4/optimizer.pt",
    "pretrain/model.safetensors",
    "runs/now/plot.png",
    "runs/now/events.out.tfevents.1",
    "training_args.bin",
    "trainer_state.json",
    "optimizer.pt",
    "summary.json",
    ".cache/config.json",
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for name in SENT | KEPT:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n")
    return tmp_path


def test_a_student_is_sent_and_its_training_is_not(directory: Path) -> None:
    with Hub().running() as hub:
        url = push_student(directory, "me/student", private=True)
        assert url == f"{hub.url}/me/student"
        files = hub.repos["models/me/student"]
        assert set(files) == SENT | {".gitattributes"}
        assert all(files[name] == (directory / name).read_bytes() for name in SENT)
        assert hub.private == {"models/me/student"}
        assert push_student(directory, "me/student") == url


def test_a_refused_login_comes_before_any_upload(directory: Path) -> None:
    with Hub().running("hf_wrong") as hub:
        with pytest.raises(HubError, match="hf auth login"):
            push_student(directory, "me/student")
        assert hub.uploads() == []


def test_a_directory_without_a_student_is_refused(tmp_path: Path) -> None:
    with Hub().running() as hub:
        with pytest.raises(UserError, match="no trained student"):
            push_student(tmp_path, "me/student")
        assert hub.requests == []


def test_a_card_goes_up_with_its_student(
    distily: Callable[..., tuple[int, str, str]], directory: Path
) -> None:
    (directory / "config.json").write_text("{}")
    (directory / "trainer_state.json").write_text("{}")
    made(directory, SUMMARY)
    (directory / "README.md").unlink()  # one that `card` did not write is not replaced
    with Hub().running() as hub:
        code, out, err = distily("card", directory, "--push-to-hub", "me/student", "--private", "--json")
        assert code == 0, err
        assert json.loads(out) == {
            "card": str(directory / "README.md"),
            "url": f"{hub.url}/me/student",
        }
        assert (
            hub.repos["models/me/student"]["README.md"]
            == (directory / "README.md").read_bytes()
            != b"# README.md\n"
        )
    with Hub().running("hf_wrong") as hub:
        code, _, err = distily("card", directory, "--push-to-hub", "me/student")
        assert (code, hub.repos) == (2, {})
        assert "hf auth login" in err
