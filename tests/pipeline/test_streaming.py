"""A data set of many portions: read, tokenised by other processes, planned and captured piece by piece."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from featurestore.maintenance.verify import verify_store
from featurestore.reader import CacheReader
from pipeline.data import portions as reading
from pipeline.data.portions import portions
from tests.command import call, cli, generate
from tests.stores import contents
from tests.teachers import text_of

# 40 documents of 60 tokens, 15 portions of 3; the last document repeats the first.
TEXTS = [*(text_of(60, seed) for seed in range(39)), text_of(60, 0)]


@pytest.fixture
def small_portions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(reading, "PORTION_SIZE", 1000)


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_portions_hold_every_document_once_and_end_when_they_are_full() -> None:
    values = [(str(i), "x" * size) for i, size in enumerate([10, 0, 500, 3, 10_000, 1])]
    for size in (1, 100, 600, 10**6):
        made = list(portions(values, size))
        assert [value for portion in made for value in portion.values] == values
        assert [portion.last for portion in made] == [False] * (len(made) - 1) + [True]
        for portion in made[:-1]:
            filled = [len(text) + 64 for _, text in portion.values]
            assert sum(filled) >= size > sum(filled[:-1])
    assert [portion.values for portion in portions([], 5)] == [[]]


def test_a_stream_makes_the_store_of_a_small_data_set(
    tiny_teacher: Path, tmp_path: Path, small_portions: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, one, many = write(tmp_path / "data.jsonl", TEXTS), tmp_path / "one", tmp_path / "many"
    planned = json.loads(cli("plan", tiny_teacher, data, "--out", many, *FLAGS, "--json")[1])
    assert planned["sampled"] and not planned["at_least"] and not many.exists()
    # The first portion is 3 of 40 documents.
    assert (planned["samples"], planned["tokens"]) == (40, 40 * 60)
    streamed = ("--streaming", *FLAGS, "--json")
    guessed = json.loads(cli("plan", tiny_teacher, data, "--out", many, *streamed)[1])
    # A file is read ahead in blocks, so that the share of a small one may be all of it.
    assert guessed["sampled"] and 3 <= guessed["samples"] <= 40
    made = generate(tiny_teacher, data, many, "--streaming")
    assert (made["samples"], made["tokens"], made["left_out"]["duplicates"]) == (39, 39 * 60, 1)
    with monkeypatch.context() as whole:
        whole.setattr(reading, "PORTION_SIZE", 10**6)
        assert generate(tiny_teacher, data, one)["left_out"] == made["left_out"]
    assert verify_store(many, deep=True).sound
    assert contents(one) == contents(many)
    # Again: nothing is tokenised, nor captured; and where it is forgotten, nothing is captured.
    done = call("distily-cache", "generate", tiny_teacher, data, "--out", many, *FLAGS, "--json")
    again = json.loads(done.stdout)
    assert "tokenising" not in done.stderr
    assert (again["tokens"], again["manifest"], again["left_out"]) == (0, made["manifest"], made["left_out"])
    for file in (tmp_path / "datasets").rglob("*.npz"):
        file.unlink()
    assert generate(tiny_teacher, data, many)["tokens"] == 0
    # More of each shard: a second column group alone.
    more = generate(tiny_teacher, data, many, "--hidden-layers", 1)
    assert (more["tokens"], more["samples"]) == (39 * 60, 39)
    assert len(CacheReader.open(many).groups) == 2


FLAGS = ("--engine", "transformers", "--max-seq-len", 64, "--shard-tokens", 256)


def test_a_stream_ends_with_the_samples_asked_for(
    tiny_teacher: Path, tmp_path: Path, small_portions: None
) -> None:
    data, store = write(tmp_path / "data.jsonl", TEXTS), tmp_path / "store"
    assert generate(tiny_teacher, data, store, "--num-samples", 8)["tokens"] == 8 * 60
    # Nothing of a portion is captured again where its shards were cut elsewhere.
    more = generate(tiny_teacher, data, store, "--num-samples", 13, "--hidden-layers", 1)
    assert (more["samples"], more["tokens"]) == (13, 13 * 60)
    reader = CacheReader.open(store)
    assert len(reader) == 13
    assert generate(tiny_teacher, data, store, "--num-samples", 13)["tokens"] == 0


def test_a_bad_row_far_behind_ends_a_stream_and_keeps_what_was_captured(
    tiny_teacher: Path, tmp_path: Path, small_portions: None
) -> None:
    rows: list[Any] = [{"text": text} for text in TEXTS[:20]]
    rows[16] = {"text": 3}
    data, store = tmp_path / "data.jsonl", tmp_path / "store"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, err = cli("generate", tiny_teacher, data, "--out", store, *FLAGS)
    assert code == 2 and "row 16" in err.splitlines()[-1] and "--bad-rows drop" in err.splitlines()[-1]
    done = generate(tiny_teacher, data, store, "--bad-rows", "drop")
    assert done["left_out"]["bad_rows"] == 1 and done["samples"] == 19
    assert 0 < done["tokens"] < 19 * 60
