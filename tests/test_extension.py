"""A cache grows by requests: each computes exactly what is missing, and old manifests keep their meaning."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from featurestore.format.schema import HiddenSpec, LogitsSpec
from featurestore.reader import CacheReader
from tests.command import call
from tests.stores import lasting
from tests.teachers import text_of


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 documents of one sample each."""
    file = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    file.write_text("\n".join(json.dumps({"text": text_of(12 + n % 19, n)}) for n in range(200)))
    return file


def hashes(store: Path) -> dict[str, str]:
    files = (file for file in store.rglob("*") if file.is_file())
    return {str(file.relative_to(store)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def train(store: Path, out: Path, manifest: str) -> tuple[str, list[dict[str, Any]]]:
    """Weights and log of a short training that reads at one manifest."""
    flags = (
        "--manifest",
        manifest,
        "--output-dir",
        out,
        "--student-model-config",
        '{"num_hidden_layers": 2}',
    )
    quick = (
        "--max-steps",
        4,
        "--per-device-train-batch-size",
        4,
        "--logging-steps",
        1,
        "--report-to",
        "none",
    )
    call("distily-train", "from-cache", store, *flags, *quick, "--student-model-as-bitnet")
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    kept = [{k: v for k, v in entry.items() if not re.search("runtime|per_second", k)} for entry in log]
    return hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest(), kept


def test_a_store_grows_by_what_is_missing_and_old_runs_reproduce(
    tiny_teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    base = (tiny_teacher, corpus, "--out", store, "--engine", "transformers", "--shard-tokens", 256)

    def generate(*flags: object) -> tuple[dict[str, Any], str, set[str]]:
        """Outcome, log, and the new files; no file that was there may change."""
        before = hashes(store) if store.exists() else {}
        forecast = json.loads(call("distily-cache", "plan", *base, *flags, "--json").stdout)
        done = call("distily-cache", "generate", *base, *flags, "--json")
        after = hashes(store)
        assert {name: after[name] for name in lasting(before)} == lasting(before)
        outcome = json.loads(done.stdout)
        assert outcome["tokens"] == forecast["tokens_to_do"]
        return outcome, done.stderr, after.keys() - before.keys()

    def tokens(count: int) -> int:
        reader = CacheReader.open(store)
        assert len(reader) == count
        return int(reader.lengths.sum())

    plain = ("--top-k", 16)
    first, _, _ = generate(*plain, "--num-samples", 100)
    old = first["manifest"]
    assert first["tokens"] == tokens(100)
    weights, log = train(store, tmp_path / "before", old)

    more, told, new = generate(*plain, "--num-samples", 200)
    assert more["tokens"] == tokens(200) - first["tokens"]
    rows = [int(r.replace(",", "")) for r in re.findall(r"committed ([\d,]+) rows", told)]
    assert sum(rows) == more["tokens"]
    assert {name.split("/")[2].split("-")[0] for name in new if name.startswith("parts/")} == {
        "logits",
        "samples.parquet",
    }

    layer, told, new = generate(*plain, "--num-samples", 200, "--hidden-layers", 2)
    assert layer["tokens"] == tokens(200)
    assert {name.split("/")[2].split("-")[0] for name in new if name.startswith("parts/")} == {"hidden.L2"}
    assert not any(name.startswith("plan-") for name in new), "every sample was planned before"

    tail, told, new = generate(*plain, "--tail", 32, "--num-samples", 200, "--hidden-layers", 2)
    assert tail["tokens"] == tokens(200)
    assert {name.split("/")[2].split("-")[0] for name in new if name.startswith("parts/")} == {"logits"}
    assert len({name.split("/")[2] for name in new if name.startswith("parts/")}) == 1
    again, told, new = generate(*plain, "--tail", 32, "--num-samples", 200, "--hidden-layers", 2)
    assert again["tokens"] == 0 and not new and "starting" not in told

    sample = CacheReader.open(store).read(150)
    assert set(sample.features) == {LogitsSpec(16), LogitsSpec(16, None, 32), HiddenSpec(2, "bf16")}
    assert len(CacheReader.open(store, old)) == 100
    assert train(store, tmp_path / "after", old) == (weights, log)
