"""`distily-cache report`: the page about a store, on a store that was made a moment ago."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from featurestore.format.schema import HiddenSpec, LogitsFeatures, LogitsSpec
from featurestore.reader import CacheReader
from featurestore.store import FeatureStore
from pipeline.generate.pace import Pace
from pipeline.report import gather, store_page
from pipeline.report.costs import further
from tests import html
from tests.command import call, generate
from tests.featurestore.conftest import fill
from tests.teachers import text_of

run = partial(call, "distily-cache")


@pytest.fixture(scope="module")
def store(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    lines = [json.dumps({"text": text_of(70, seed)}) for seed in range(6)]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    more = ("--top-k", 6, "--hidden-layers", 1, "--hidden-dtype", "int8")
    generate(tiny_teacher, folder / "corpus.jsonl", folder / "cache", *more)
    return folder / "cache"


def test_the_page_says_what_the_store_holds(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("report", store, "--samples", 3, "--json")
    assert json.loads(done.stdout) == {"report": "cache-report.html"}
    text = (tmp_path / "cache-report.html").read_text()
    page = html.page(text)
    found = json.loads(run("info", store, "--json").stdout)
    assert page.texts["b"][:2] == [f"{found['samples']:,}", f"{found['rows']:,}"]
    for shown in (found["identity"]["digest"], found["manifest"], *found["groups"]):
        assert shown in text
    assert f"Measured on 3 of {found['samples']} samples" in text
    assert any("generate" in command and "--top-k 6" in command for command in page.texts["pre"])
    charts = [title for title in page.texts["title"] if " by " in title]
    assert len(charts) == 6
    assert page.texts["h2"] == [
        "What the teacher said",
        "Where the bytes are",
        "A sample, token by token",
        "Shards",
        "What more would cost",
        "The commands that made it",
    ]


def test_the_sample_is_coloured_by_what_the_teacher_knew(store: Path) -> None:
    """Token by token against the features as the reader gives them, in float64."""
    found, reader = gather(str(store), 2), CacheReader.open(store)
    assert found.view is not None and found.pieces is not None
    text = html.page(store_page(found))
    spec = reader.find("logits")
    sample = reader.read(found.view.index, [spec])
    head = sample.features[spec]
    assert isinstance(head, LogitsFeatures)
    starts = np.cumsum(head.counts, dtype=np.int64) - head.counts
    tips, classes = text.texts["small"], iter(text.attributes["class"])
    tokens = sample.tokens[: len(found.view.rows)].tolist()
    assert len(tips) == len(tokens) - 1
    for t, (token, tip) in enumerate(zip(tokens[1:], tips, strict=True)):
        inside = slice(starts[t], starts[t] + head.counts[t])
        p = np.exp(head.logits[inside].astype(np.float64) - head.lse[t])
        best = [f"{found.pieces(int(one))!r}" for one in head.ids[inside][:5]]
        entropy, label = float(head.entropy[t]), float(head.label_logprob[t])
        said = (f"p {np.exp(label):.3g}", f"log p {label:z.2f}", f"entropy {entropy:.2f} nats")
        assert tip == " · ".join((*said, f"{p.sum():.1%} in the head"))
        shown = text.texts["bdi"][5 * t : 5 * t + 5]
        assert shown == best and f"Position {t + 1}: {found.pieces(token)!r}" in text.texts["b"]
        uncertain = sum(entropy > edge for edge in (0.1, 0.5, 1.5, 3.0))
        surprised = sum(np.exp(label) < least for least in (0.5, 0.1, 0.01, 0.001))
        assert next(one for one in classes if one.startswith("s0")) == f"s0{uncertain} s1{surprised}"


def test_histograms_count_every_position_that_is_learned_from(store: Path) -> None:
    found, reader = gather(str(store), 1000), CacheReader.open(store)
    assert found.survey is not None
    assert found.survey.ranks.samples == len(reader)
    spec = reader.find("logits")
    heads = [reader.read(index, [spec]).features[spec] for index in range(len(reader))]
    # All but the last of each, which has no next token.
    sizes = [head.counts[:-1] for head in heads if isinstance(head, LogitsFeatures)]
    assert sorted(found.survey.head_sizes) == sorted(np.concatenate(sizes))
    entropy = [head.entropy[:-1] for head in heads if isinstance(head, LogitsFeatures)]
    assert sorted(found.survey.entropy) == sorted(np.concatenate(entropy))


def test_what_more_would_cost(store: Path) -> None:
    info = gather(str(store), 1).info
    costs = further(info, Pace(10.0, "here"))
    assert [cost.seconds for cost in costs[:5]] == [info.rows / 10] * 5
    assert [cost.bytes for cost in costs[:4]] == [
        info.rows * size for size in (16 + 2 + 4, 32 + 2, 64 + 4, 128)
    ]
    assert costs[5].bytes == pytest.approx(1000 * info.bytes / info.samples)
    assert all(cost.seconds is None for cost in further(info, None))


def test_a_store_without_logits_or_manifest(tmp_path: Path) -> None:
    filled = fill(tmp_path / "hidden", [HiddenSpec(1, "f32")], count=3)
    page = html.page(store_page(gather(str(filled.path), 4)))
    assert "A sample, token by token" not in page.texts["h2"]
    identity = CacheReader.open(filled.path).identity
    FeatureStore.create(tmp_path / "empty", identity)
    text = store_page(gather(str(tmp_path / "empty"), 4))
    html.page(text)
    assert "It has no manifest yet" in text


def test_incomplete_shards_come_first(store: Path, tmp_path: Path) -> None:
    shutil.copytree(store, tmp_path / "copy")
    victim = sorted((tmp_path / "copy").glob("commit/hidden*/*.json"))[-1]
    victim.unlink()
    for manifest in (*(tmp_path / "copy").glob("MANIFEST-*"), *(tmp_path / "copy").glob("heads/*")):
        manifest.unlink()
    text = store_page(gather(str(tmp_path / "copy"), 4))
    assert "1 incomplete: run the same `generate` again" in text
    cells = html.page(text).texts["td"]
    assert cells.index("incomplete") < cells.index("complete")


def test_damage_is_named_on_the_page_and_the_rest_is_shown(store: Path, tmp_path: Path) -> None:
    shutil.copytree(store, tmp_path / "copy")
    victim = next((tmp_path / "copy").glob("parts/*/logits-*/head_gaps/c/0"))
    victim.write_bytes(victim.read_bytes()[:-1] + b"\0")
    done = run("report", tmp_path / "copy", "--samples", 1000, "--out", tmp_path / "page.html")
    assert done.stderr.startswith("distily-cache: left out: ") and "head_gaps" in done.stderr
    text = (tmp_path / "page.html").read_text()
    assert "Left out, because features are damaged" in text and "Where the bytes are" in text


def test_hostile_names_are_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    filled = fill(tmp_path / "<b>store", [LogitsSpec(2)], count=3)
    store = FeatureStore.open(filled.path)
    record = {
        "argv": [evil, evil],
        "began": evil,
        "tokens": evil,
        "versions": {evil: [evil]},
        "writing": {"by": evil},
    }
    store.add_provenance(record)
    store.add_provenance({"argv": ["half\ud800"], "tokens": evil, "capture_seconds": 2})
    store.add_provenance({"argv": "text", "command": evil, "hardware": evil, "capture_seconds": 0})
    run("report", filled.path, "--out", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    html.page(text)
    assert evil not in text and "<b>store" not in text and r"half\ud800" in text


def test_what_cannot_be_served(store: Path, tmp_path: Path) -> None:
    for arguments, said in (
        ((tmp_path / "none",), "none"),
        ((store, "--out", tmp_path / "no" / "a.html"), "which is no directory; make it first"),
        ((store, "--out", tmp_path), "is a directory; name a file in it"),
    ):
        done = run("report", *arguments, code=2)
        assert done.stdout == "" and said in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.rglob("*.html"))
