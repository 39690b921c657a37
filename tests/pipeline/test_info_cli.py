"""`distily-cache info`: bars, and a sample token by token."""

from __future__ import annotations

import json
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from featurestore.format.codec import head_mass
from featurestore.format.schema import LogitsFeatures, LogitsSpec
from featurestore.maintenance.inspect import RowView, SampleView
from featurestore.reader import CacheReader
from pipeline.report.terminal import bar, render_sample, sample_json
from pipeline.report.token_text import load_pieces
from tests.command import call, generate
from tests.teachers import text_of

run = partial(call, "distily-cache")


@pytest.fixture(scope="module")
def store(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("info")
    lines = [json.dumps({"text": text_of(40, seed)}) for seed in range(5)]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    generate(tiny_teacher, folder / "corpus.jsonl", folder / "store", "--top-k", 6)
    return folder / "store"


def test_info_draws_bytes_and_mass(store: Path) -> None:
    text = run("info", store).stdout
    for part in ("where the bytes are", "head_index", "samples.parquet", "█", "from 5 of 5 samples"):
        assert part in text
    found = json.loads(run("info", store, "--json").stdout)
    assert found["mass_by_rank"]["ranks"] == [1, 2, 4, 6]
    masses = []
    for index in range(5):
        (head,) = CacheReader.open(store).read(index, [LogitsSpec(6)]).features.values()
        assert isinstance(head, LogitsFeatures)
        masses += head_mass(head.counts, head.logits, head.lse)[:-1].tolist()  # the last has no next token
    assert found["mass_by_rank"]["cumulative"][-1] == pytest.approx(np.mean(masses), abs=1e-3)


def test_a_sample_is_shown_as_the_teacher_saw_it(store: Path, tiny_teacher: Path) -> None:
    found = json.loads(run("info", store, "--sample", 2, "--tokens", 7, "--json").stdout)
    sample = CacheReader.open(store).read(2)
    assert (found["index"], found["id"], found["length"]) == (2, sample.id, len(sample.tokens))
    assert len(found["rows"]) == 7
    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher).eval()
    with torch.inference_mode():
        logits = model(torch.from_numpy(sample.tokens.astype(np.int64))[None]).logits[0].double()
    p = logits.softmax(-1).numpy()
    for t, row in enumerate(found["rows"]):
        # With the space that it has inside a text.
        assert row["text"] == " " + tokenizer.decode([int(sample.tokens[t])])
        assert row["next_token"] == sample.tokens[t + 1]
        assert row["probability"] == pytest.approx(p[t, sample.tokens[t + 1]], rel=0.01)
        best = np.argsort(-p[t])[:5]
        assert [one["token"] for one in row["best"]] == best.tolist()
        np.testing.assert_allclose([one["probability"] for one in row["best"]], p[t, best], rtol=0.08)
        assert row["head_mass"] == pytest.approx(np.sort(p[t])[-6:].sum(), abs=4e-3)
        assert row["entropy"] == pytest.approx(-(p[t] * np.log(p[t])).sum(), abs=0.01)
    text = run("info", store, "--sample", 2).stdout
    assert repr(found["rows"][0]["text"]) in text and "40 of" in text and f"{found['length']} tokens" in text


@pytest.mark.parametrize("sample", ["5", "-1", "99999999999"])
def test_a_sample_that_is_not_there(store: Path, sample: str) -> None:
    done = run("info", store, "--sample", sample, code=2)
    assert done.stdout == ""
    assert done.stderr == f"distily-cache: --sample {sample}: {store} has 5 samples, 0 to 4\n"


def test_a_damaged_shard_is_named_and_the_rest_is_shown(store: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(store, copy)
    victim = next(copy.glob("parts/*/logits-*/head_gaps/c/0"))
    victim.write_bytes(victim.read_bytes()[:-1] + b"\0")
    done = run("info", copy, "--json")
    found = json.loads(done.stdout)
    assert found["mass_by_rank"] is None and found["samples"] == 5
    assert done.stderr.count("\n") == 1 and "left out" in done.stderr and "head_gaps" in done.stderr
    run("info", copy, "--sample", 0, code=1)


def test_ids_are_shown_where_there_is_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No files, files that are no tokenizer, transformers not installed; a token without text."""
    assert load_pieces(tmp_path / "none") is None
    (tmp_path / "tokenizer.json").write_text("{}")
    assert load_pieces(tmp_path) is None
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert load_pieces(tmp_path) is None
    row = RowView(
        position=0,
        token=17,
        learned=True,
        next_token=None,
        probability=None,
        best=[(123, 0.5), (7, 0.25)],
        head_mass=0.75,
        entropy=None,
    )
    view = SampleView(0, "ab" * 16, 1, [row])
    assert sample_json(view, None)["rows"][0]["best"][0] == {"token": 123, "text": None, "probability": 0.5}
    pieces = {17: "[red]\n", 123: "", 7: "\x1b[2J"}.__getitem__
    for given, parts in ((None, ("17", "123 0.50")), (pieces, (r"'[red]\n'", "123 0.50", r"'\x1b[2J' 0.25"))):
        console = Console(width=200, record=True)
        render_sample(console, view, given)
        text = console.export_text()
        assert all(part in text for part in parts)


def test_bars() -> None:
    assert bar(0) == "" and bar(1e-9) == "█" and bar(1) == 30 * "█" and bar(0.5) == 15 * "█"
