"""A request that the store covers is not tokenised again; any change of what samples are made of is."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from tests import teachers
from tests.command import call, cli, generate


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def write(path: Path, *texts: str) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


TEXTS = [teachers.text_of(words, words) for words in (9, 70, 1, 30)]


def test_a_covered_request_does_not_tokenise(tiny_teacher: Path, tmp_path: Path) -> None:
    data, store = write(tmp_path / "data.jsonl", *TEXTS), tmp_path / "store"
    first = generate(tiny_teacher, data, store)
    assert first["tokens"] and first["left_out"]["too_short"]
    arguments = (tiny_teacher, data, "--out", store, "--engine", "transformers", "--max-seq-len", 64)
    done = call("distily-cache", "generate", *arguments, "--json")
    again = json.loads(done.stdout)
    assert "tokenising" not in done.stderr
    assert (again["tokens"], again["samples"], again["manifest"], again["left_out"]) == (
        0,
        first["samples"],
        first["manifest"],
        first["left_out"],
    )
    code, _, err = cli("plan", *arguments, "--top-k", 4, "--tail", 0, "--num-samples", 3)
    assert code == 0 and "tokenising" in err  # another request
    shown = cli("plan", *arguments, "--json")
    assert "tokenising" not in shown[2] and json.loads(shown[1])["tokens_to_do"] == 0


@pytest.mark.parametrize(
    ("flags", "new"), [((), True), (("--max-seq-len", 32), False), (("--shuffle-seed", 3), False)]
)
def test_what_samples_are_made_of_is_looked_at(
    tiny_teacher: Path, tmp_path: Path, flags: tuple[object, ...], new: bool
) -> None:
    data, store = write(tmp_path / "data.jsonl", *TEXTS), tmp_path / "store"
    generate(tiny_teacher, data, store)
    if new:
        write(data, *TEXTS[:-1], teachers.text_of(30, 99))
    base = (tiny_teacher, data, "--out", store, "--engine", "transformers", "--max-seq-len", 64)
    done = call("distily-cache", "generate", *base, *flags, "--json")
    assert "tokenising" in done.stderr
    if new:
        assert json.loads(done.stdout)["tokens"] == 30


def test_more_of_the_same_samples_is_captured(tiny_teacher: Path, tmp_path: Path) -> None:
    data, store = write(tmp_path / "data.jsonl", *TEXTS), tmp_path / "store"
    first = generate(tiny_teacher, data, store)
    more = generate(tiny_teacher, data, store, "--hidden-layers", 1)
    assert more["tokens"] == first["tokens"]
    assert cli("verify", store, "--deep")[0] == 0


def test_what_cannot_be_read_is_forgotten(tiny_teacher: Path, tmp_path: Path) -> None:
    data, store = write(tmp_path / "data.jsonl", *TEXTS), tmp_path / "store"
    generate(tiny_teacher, data, store)
    kept = list((tmp_path / "datasets").rglob("*.npz"))
    assert len(kept) == 1
    kept[0].write_bytes(b"PK\x03\x04 broken")
    assert generate(tiny_teacher, data, store)["tokens"] == 0
