"""`distily-cache import` as a user runs it: every row where it belongs, wrong flags refused."""

from __future__ import annotations

import json
import math
import shutil
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distily.system.stopping import Stopped
from featurestore.format.codec import LOGPROB_ERROR
from featurestore.format.schema import LogitsFeatures, LogitsSpec
from featurestore.maintenance.verify import verify_store
from featurestore.reader import CacheReader
from featurestore.store import FeatureStore
from tests.command import cli
from tests.pipeline.peers import texts_and_heads, write_axolotl, write_distillkit

VOCAB = 199
# Not smooth enough for a polynomial: some rows sum to more than one, as real ones do.
CONFIG = {
    "d": VOCAB,
    "k": 8,
    "exact_k": 2,
    "polynomial_terms": [0, 1],
    "residual_bins": [{"scale_dtype": "float16", "element_bits": 4, "num_elements": 6}],
}


@pytest.fixture
def teacher(tiny_teacher: Path, tmp_path: Path) -> Path:
    """Config and tokenizer without weights."""
    folder = tmp_path / "teacher"
    shutil.copytree(tiny_teacher, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def check(store: Path, texts: list[list[int]], heads: list[list[dict[int, float]]], prompt: int = 0) -> int:
    """Every text is there, row t has the head of the token at t + 1; returns the heads that were closed."""
    assert verify_store(store, deep=True).sound
    reader = CacheReader.open(store)
    spec = reader.find("logits")
    assert isinstance(spec, LogitsSpec) and spec.partial
    found = {tuple(reader.read(i).tokens.tolist()): reader.read(i, [spec]) for i in range(len(reader))}
    assert set(found) == set(map(tuple, texts)) and len(reader) == len(texts)
    closed = 0
    for text, rows in zip(texts, heads, strict=True):
        one = found[tuple(text)]
        assert one.loss_mask.tolist() == [i >= prompt for i in range(len(text))]
        features = one.features[spec]
        assert isinstance(features, LogitsFeatures) and np.isnan(features.entropy).all()
        cuts = np.cumsum(features.counts)[:-1]
        stored = list(zip(np.split(features.ids, cuts), np.split(features.logits, cuts), strict=True))
        for t, (ids, logits) in enumerate(stored):
            if t + 1 < max(prompt, 1) or t == len(text) - 1:
                # Nothing is known: token 0 at 1 / V.
                assert ids.tolist() == [0] and logits[0] == pytest.approx(-math.log(VOCAB), abs=LOGPROB_ERROR)
                assert np.isnan(features.label_logprob[t])
                continue
            mass = sum(map(math.exp, rows[t].values()))
            closed += mass > 1 + 1e-5
            wanted = {i: p - math.log(max(mass, 1.0)) for i, p in rows[t].items()}
            assert set(ids.tolist()) == set(wanted)
            for i, logit in zip(ids.tolist(), logits.tolist(), strict=True):
                assert logit == pytest.approx(wanted[i], abs=LOGPROB_ERROR + 1e-4)
            label = features.label_logprob[t]
            if text[t + 1] in wanted:
                assert label == pytest.approx(wanted[text[t + 1]], abs=1 / 128 + 1e-4)
            else:
                assert np.isnan(label)
    return closed


def test_distillkit(teacher: Path, tmp_path: Path) -> None:
    texts, heads = texts_and_heads(12, VOCAB, 8)
    told = write_distillkit(tmp_path / "captured", texts, heads, CONFIG)
    command = ["import", tmp_path / "captured", "--out", tmp_path / "store", "--teacher", teacher]
    command += ["--layout", "distillkit", "--shard-tokens", 64, "--json"]
    code, out, err = cli(*command)
    assert code == 0, err
    outcome = json.loads(out)
    closed = check(tmp_path / "store", texts, told)
    assert outcome["renormalised"] == closed > 0
    assert outcome["samples"] == outcome["unknown"] == 12 and outcome["dropped"] == 0
    tokens = sum(map(len, texts))
    assert outcome["tokens"] == outcome["written"] == tokens and outcome["top_k"] == 8
    identity = CacheReader.open(tmp_path / "store").identity
    assert identity.engine == "import:distillkit" and identity.vocab_size == VOCAB
    assert (tmp_path / "store" / "teacher" / "config.json").is_file()

    again = json.loads(cli(*command)[1])
    assert again["written"] == 0 and again["manifest"] == outcome["manifest"]

    code, out, _ = cli("info", tmp_path / "store", "--json")
    (group,) = [g for g in json.loads(out)["groups"].values() if g["kind"] == "logits"]
    assert group["perplexity"] is None and group["mean_entropy"] is None and group["mean_head_size"] > 7
    code, out, _ = cli("info", tmp_path / "store")
    assert code == 0 and "perplexity" not in out and "without capture" in out


@pytest.mark.parametrize("targets", ["next", "own"])
def test_axolotl(teacher: Path, tmp_path: Path, targets: str) -> None:
    texts, heads = texts_and_heads(8, VOCAB, 5)
    write_axolotl(tmp_path / "rows.parquet", texts, heads, prompt=4, own=targets == "own")
    base = ["import", tmp_path / "rows.parquet", "--out", tmp_path / "store", "--teacher", teacher]
    base += ["--layout", "axolotl"]
    code, _, err = cli(*base)
    if targets == "own":
        assert code == 2 and "give --targets own" in err and len(err.splitlines()) == 1
        assert not (tmp_path / "store").exists()
        code, _, err = cli(*base, "--targets", "own")
    assert code == 0, err
    assert check(tmp_path / "store", texts, heads, prompt=4) == 0


def test_rows_that_are_of_earlier_tokens_are_refused_unless_said_so(teacher: Path, tmp_path: Path) -> None:
    texts, heads = texts_and_heads(8, VOCAB, 8)
    moved = [[rows[0], *rows[:-1]] for rows in heads]
    write_distillkit(tmp_path / "captured", texts, moved, CONFIG)
    base = ["import", tmp_path / "captured", "--out", tmp_path / "store", "--teacher", teacher]
    base += ["--layout", "distillkit"]
    code, _, err = cli(*base)
    assert code == 2 and "give --targets next" in err and not (tmp_path / "store").exists()
    assert cli(*base, "--targets", "next")[0] == 0


def test_weights_do_not_matter(teacher: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    """The same store from the whole checkpoint and from its config and tokenizer."""
    texts, heads = texts_and_heads(3, VOCAB, 5)
    write_axolotl(tmp_path / "rows.parquet", texts, heads, prompt=0, own=False)
    for one in (teacher, tiny_teacher):
        arguments = [tmp_path / "rows.parquet", "--out", tmp_path / "store", "--teacher", one]
        code, _, err = cli("import", *arguments, "--layout", "axolotl")
        assert code == 0, err


def test_killed_and_completed(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, heads = texts_and_heads(8, VOCAB, 5)
    write_axolotl(tmp_path / "rows.parquet", texts, heads, prompt=0, own=False)
    base = ["import", tmp_path / "rows.parquet", "--out", tmp_path / "store", "--teacher", teacher]
    base += ["--layout", "axolotl", "--shard-tokens", 64]
    real, calls = FeatureStore.write_bundle, 0

    def dies(self: FeatureStore, *arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise Stopped(signal.SIGINT)  # as the handler of Ctrl-C does
        return real(self, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(FeatureStore, "write_bundle", dies)
        code, _, err = cli(*base)
        assert code == 130 and "interrupted; what is committed is kept, the same command resumes" in err
    code, out, err = cli(*base, "--json")
    assert code == 0, err
    assert 0 < json.loads(out)["written"] < sum(map(len, texts))
    check(tmp_path / "store", texts, heads)


def test_samples_in_a_shard_of_another_data_set_stay(teacher: Path, tmp_path: Path) -> None:
    """A shard is completed whole or not at all: the second data set has half of the first one's samples."""
    texts, heads = texts_and_heads(6, VOCAB, 5)
    wide = [[{**row, **{i: -9.0 for i in range(3) if i not in row}} for row in rows] for rows in heads]
    write_axolotl(tmp_path / "first.parquet", texts[:4], heads[:4], prompt=0, own=False)
    write_axolotl(tmp_path / "second.parquet", texts[2:], wide[2:], prompt=0, own=False)
    told = []
    for name in ("first", "second"):
        arguments = [tmp_path / f"{name}.parquet", "--out", tmp_path / "store", "--teacher", teacher]
        code, out, err = cli("import", *arguments, "--layout", "axolotl", "--json")
        assert code == 0, err
        told.append(json.loads(out))
    assert (told[1]["dropped"], told[1]["samples"]) == (2, 4)
    assert told[1]["written"] == sum(map(len, texts[4:])) and told[1]["top_k"] > 5
    reader = CacheReader.open(tmp_path / "store")
    assert len(reader) == 6 and reader.find("logits") == LogitsSpec(5, partial=True)


def test_packed_rows_become_documents(teacher: Path, tmp_path: Path) -> None:
    texts, heads = texts_and_heads(5, VOCAB, 6)
    rows = [head for text_rows in heads for head in text_rows]
    table = pa.table(
        {
            "input_ids": [[token for text in texts for token in text[:-1]]],
            "token_ids": [[list(head) for head in rows]],
            "top_values": [[list(head.values()) for head in rows]],
            "attention_mask": [[i + 1 for i, text_rows in enumerate(heads) for _ in text_rows]],
        }
    )
    pq.write_table(table, tmp_path / "packed.parquet")
    arguments = [tmp_path / "packed.parquet", "--out", tmp_path / "store", "--teacher", teacher]
    code, out, err = cli("import", *arguments, "--layout", "distillkit", "--json")
    assert code == 0, err
    assert (json.loads(out)["samples"], json.loads(out)["unknown"]) == (5, 0)
    reader = CacheReader.open(tmp_path / "store")
    assert {tuple(reader.read(i).tokens.tolist()) for i in range(5)} == {tuple(text[:-1]) for text in texts}


def test_refusals(teacher: Path, tmp_path: Path) -> None:
    texts, heads = texts_and_heads(3, VOCAB, 8)
    write_distillkit(tmp_path / "captured", texts, heads, CONFIG)
    data, out = tmp_path / "captured" / "data_0.parquet", tmp_path / "store"
    small = texts_and_heads(1, 4 * VOCAB, 5)
    write_axolotl(tmp_path / "large.parquet", *small, prompt=0, own=False)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "file").touch()
    shutil.copy(data, tmp_path / "alone.parquet")
    for dataset, store, flags, what in (
        (data, out, ["--layout", "tinker"], "--layout tinker"),
        (data, out, ["--layout", "axolotl"], "--layout axolotl"),
        (data, out, ["--layout", "distillkit", "--targets", "own"], "--targets own"),
        (data, out, ["--layout", "distillkit", "--compression", tmp_path / "none"], "--compression"),
        (tmp_path / "alone.parquet", out, ["--layout", "distillkit"], "compression_config.yaml"),
        (tmp_path / "none.parquet", out, ["--layout", "distillkit"], "no such file"),
        (tmp_path / "large.parquet", out, ["--layout", "axolotl"], "vocabulary ends at 198"),
        (data, mine, ["--layout", "distillkit"], "not a feature store"),
    ):
        code, _, err = cli("import", dataset, "--out", store, "--teacher", teacher, *flags)
        assert code == 2 and what in err and len(err.splitlines()) == 1, err
    assert not out.exists()


def test_another_layout_is_another_store(teacher: Path, tmp_path: Path) -> None:
    texts, heads = texts_and_heads(3, VOCAB, 8)
    write_distillkit(tmp_path / "captured", texts, heads, CONFIG)
    write_axolotl(tmp_path / "rows.parquet", texts, heads, prompt=0, own=False)
    common = ["--out", tmp_path / "store", "--teacher", teacher, "--layout"]
    assert cli("import", tmp_path / "captured", *common, "distillkit")[0] == 0
    code, _, err = cli("import", tmp_path / "rows.parquet", *common, "axolotl")
    assert code == 2 and "engine" in err
