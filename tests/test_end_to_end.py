"""The main job on the demo teacher: vLLM, the store, and a ternary student from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from featurestore.format.schema import HiddenSpec
from featurestore.reader import CacheReader
from tests.command import call, spawn

HIDDEN = ("--hidden-layers", "15", "--hidden-dtype", "int4", "--hidden-positions", "0.5")


@pytest.fixture(scope="module")
def texts(demo: Path) -> Path:
    """The beginnings of 24 of the demo's documents."""
    rows = [json.loads(line) for line in (demo / "topics.jsonl").read_text().splitlines()[:24]]
    file = demo / "beginnings.jsonl"
    file.write_text("\n".join(json.dumps({"text": row["text"][:350]}) for row in rows))
    return file


@pytest.fixture(scope="module")
def cache(demo: Path, texts: Path) -> Path:
    """A cache of them, one sample each, with hidden states of four bits at half the positions."""
    store = demo / "cache"
    arguments = [demo / "teacher", texts, "--out", store, "--max-seq-len", 256]
    arguments += ["--shard-tokens", 512, "--top-k", 32, *HIDDEN]
    made = json.loads(spawn("distily-cache", "generate", *arguments, "--json", timeout=900).stdout)
    assert made["tokens"] == int(sum(CacheReader.open(store).lengths))
    return store


@pytest.mark.vllm
def test_the_cache_is_whole_and_asks_for_nothing_more(demo: Path, texts: Path, cache: Path) -> None:
    reader = CacheReader.open(cache)
    assert len(reader) == 24
    assert reader.find("hidden.L15") == HiddenSpec(15, "int4", 0.5)
    groups = json.loads(call("distily-cache", "info", cache, "--json").stdout)["groups"]
    (error,) = [group["relative_error"] for group in groups.values() if group["kind"] == "hidden.L15"]
    # Sixteen levels for a Gaussian leave a tenth of it (Max 1960); that outliers are kept apart leaves less.
    assert 0 < error < 0.1
    assert json.loads(call("distily-cache", "verify", cache, "--deep", "--json").stdout)["problems"] == []
    arguments = [demo / "teacher", texts, "--out", cache, "--max-seq-len", 256]
    again = call("distily-cache", "generate", *arguments, "--top-k", 32)
    assert "nothing to generate" in again.stderr
    assert "starting" not in again.stderr


@pytest.mark.vllm
def test_a_ternary_student_learns_from_it(cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "student"
    config = '{"num_hidden_layers": 3}'
    done = spawn(
        "distily-train",
        *("from-cache", cache, "--output-dir", out, "--student-model-config", config),
        *("--student-model-as-bitnet", "--hidden-loss", "cosine", "--ce-weight", "0.1"),
        *(
            "--eval-fraction",
            0.25,
            "--max-steps",
            8,
            "--per-device-train-batch-size",
            2,
            "--learning-rate",
            "1e-3",
            "--json",
        ),
    )
    summary = json.loads(done.stdout)
    assert summary["last_eval"]["eval_kl"] < 0.9 * summary["first_eval"]["eval_kl"]
    assert (out / "report.html").is_file()
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert model.config.num_hidden_layers == 3
    with torch.compiler.set_stance("force_eager"):
        logits = model(**tokenizer("The assert statement", return_tensors="pt")).logits
    assert logits.isfinite().all()
