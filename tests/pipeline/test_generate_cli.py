"""`distily-cache generate` as a user runs it, with the transformers engine on a tiny teacher."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from featurestore.catalogue.manifest import read_manifest
from featurestore.format.codec import LOGPROB_ERROR, LSE_ERROR, ROW_ERROR
from featurestore.format.schema import HiddenSpec, LogitsSpec, LseSpec, group_id
from featurestore.reader import CacheReader
from featurestore.storage.root import root_of
from tests.command import call, command, generate
from tests.stores import lasting
from tests.teachers import text_of


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    file = tmp_path / "corpus.jsonl"
    lines = [json.dumps({"text": text_of(40 + 13 * index, index), "n": index}) for index in range(24)]
    file.write_text("\n".join(lines))
    return file


run = partial(call, "distily-cache")


def files_of(store: Path) -> dict[str, tuple[int, int]]:
    return lasting(
        {
            str(file.relative_to(store)): (file.stat().st_mtime_ns, file.stat().st_ino)
            for file in store.rglob("*")
            if file.is_file()
        }
    )


def test_features_are_the_teachers(tiny_teacher: Path, corpus: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    generate(tiny_teacher, corpus, store, "--top-k", 8, "--hidden-layers", "0,2,3", "--hidden-dtype", "f32")
    reader = CacheReader.open(store)
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher).eval()
    logits_spec = LogitsSpec(8)
    for index in (0, len(reader) // 2, len(reader) - 1):
        sample = reader.read(index)
        with torch.inference_mode():
            out = model(torch.from_numpy(sample.tokens.astype(np.int64))[None], output_hidden_states=True)
        head = sample.features[logits_spec]
        top = torch.topk(out.logits[0].float(), 8)
        assert head.ids.reshape(-1, 8).tolist() == top.indices.tolist()
        logprobs = torch.log_softmax(out.logits[0].double(), -1)
        found = head.logits.reshape(-1, 8) - head.lse[:, None]
        exact = logprobs.gather(-1, top.indices).numpy()
        assert np.abs(found - exact).max() <= LOGPROB_ERROR + 1e-4
        # An exact head of 8 and its mass, so that head and tail together keep what they weigh.
        assert np.abs(np.exp(found).sum(-1) - np.exp(exact).sum(-1)).max() <= 1e-3
        bound = ROW_ERROR + 1e-4
        assert np.abs(head.lse - torch.logsumexp(out.logits[0].double(), -1).numpy()).max() <= bound
        assert np.abs(head.entropy + (logprobs.exp() * logprobs).sum(-1).numpy()).max() <= bound
        labels = torch.from_numpy(sample.tokens[1:].astype(np.int64))
        expected = logprobs[:-1].gather(-1, labels[:, None])[:, 0].numpy()
        assert np.abs(head.label_logprob[:-1] - expected).max() <= bound
        for layer in (0, 2, 3):
            hidden = sample.features[HiddenSpec(layer, "f32")].to_float32()
            np.testing.assert_allclose(hidden, out.hidden_states[layer][0].numpy(), atol=1e-5)


def test_the_same_request_computes_nothing_and_touches_nothing(
    tiny_teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    assert generate(tiny_teacher, corpus, store, "--top-k", 8)["tokens"]
    before = files_of(store)
    again = generate(tiny_teacher, corpus, store, "--top-k", 8)
    narrower = generate(tiny_teacher, corpus, store, "--top-k", 4)
    assert (again["tokens"], narrower["tokens"]) == (0, 0)
    assert files_of(store) == before


def test_extension_computes_only_what_is_missing(tiny_teacher: Path, corpus: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    first = generate(tiny_teacher, corpus, store, "--top-k", 8, "--num-samples", 10)
    before, rows_before = files_of(store), int(sum(CacheReader.open(store).lengths))
    more = generate(tiny_teacher, corpus, store, "--top-k", 8, "--num-samples", 20)
    lengths = CacheReader.open(store).lengths
    assert len(lengths) == 20
    assert first["tokens"] == rows_before
    assert more["tokens"] == int(sum(lengths)) - rows_before
    layer = generate(tiny_teacher, corpus, store, "--top-k", 8, "--num-samples", 20, "--hidden-layers", 1)
    assert layer["tokens"] == int(sum(lengths))
    after = files_of(store)
    assert {name: after[name] for name in before} == before
    sample = CacheReader.open(store).read(15)
    assert set(sample.features) == {LogitsSpec(8), HiddenSpec(1, "bf16")}


def test_killed_and_started_again_it_goes_on(tiny_teacher: Path, corpus: Path, tmp_path: Path) -> None:
    store, undisturbed = tmp_path / "store", tmp_path / "undisturbed"
    arguments = ("generate", tiny_teacher, corpus, "--engine", "transformers", "--max-seq-len", 64)
    options = ("--shard-tokens", 128, "--top-k", 8)
    run(*arguments, *options, "--out", undisturbed)
    process = subprocess.Popen(
        command("distily-cache", *arguments, *options, "--out", store),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while len(list(store.glob("commit/logits-*/*.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    committed = len(list(store.glob("commit/logits-*/*.json")))
    total = len(list(undisturbed.glob("commit/logits-*/*.json")))
    assert 2 <= committed < total, "the kill came too late to show anything"
    again = run(*arguments, *options, "--out", store, "--json")
    assert 0 < json.loads(again.stdout)["tokens"] < int(sum(CacheReader.open(undisturbed).lengths))
    run("verify", store, "--deep")
    ours, theirs = CacheReader.open(store), CacheReader.open(undisturbed)
    assert ours.sample_ids == theirs.sample_ids
    for index in range(len(ours)):
        mine, other = ours.read(index).features[LogitsSpec(8)], theirs.read(index).features[LogitsSpec(8)]
        for field in ("counts", "ids", "logits", "lse", "entropy"):
            np.testing.assert_array_equal(getattr(mine, field), getattr(other, field))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_it_says_so_and_goes_on(
    tiny_teacher: Path, corpus: Path, tmp_path: Path, number: int, code: int
) -> None:
    store = tmp_path / "store"
    arguments = ("generate", tiny_teacher, corpus, "--engine", "transformers", "--max-seq-len", 64)
    options = ("--shard-tokens", 128, "--top-k", 8, "--out", store)
    process = subprocess.Popen(
        command("distily-cache", *arguments, *options),
        stderr=subprocess.PIPE,
        text=True,
        # Whoever runs the tests in the background may have it ignored, and a command would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509  (takes no lock)
    )
    deadline = time.monotonic() + 120
    while not list(store.glob("commit/logits-*/*.json")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(number)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == code, stderr
    word = "interrupted" if number == signal.SIGINT else "terminated"
    assert re.fullmatch(
        rf"distily-cache: {word}; [\d,]+ of [\d,]+ tokens are committed and kept, "
        "the same command resumes there",
        stderr.splitlines()[-1],
    )
    assert "Traceback" not in stderr
    assert json.loads(run(*arguments, *options, "--json").stdout)["tokens"] > 0
    run("verify", store, "--deep")


def test_plan_says_what_is_missing_and_writes_nothing(
    tiny_teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    arguments = (tiny_teacher, corpus, "--out", store, "--engine", "transformers", "--max-seq-len", 64)
    planned = json.loads(run("plan", *arguments, "--json").stdout)
    assert not store.exists()
    assert planned["tokens_to_do"] == planned["tokens"] > 0
    assert planned["groups_to_do"] == ["logits"]
    done = json.loads(run("generate", *arguments, "--json").stdout)
    assert done["tokens"] == planned["tokens"]
    assert json.loads(run("plan", *arguments, "--json").stdout)["tokens_to_do"] == 0
    assert "nothing" in run("plan", *arguments).stdout


def test_info_and_verify(tiny_teacher: Path, corpus: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    done = generate(tiny_teacher, corpus, store, "--top-k", 8, "--hidden-layers", 2)
    found = json.loads(run("info", store, "--json").stdout)
    assert found["rows"] == done["tokens"]
    assert found["identity"]["architecture"] == "LlamaForCausalLM"
    text = run("info", store).stdout
    assert "hidden.L2" in text
    assert json.loads(run("verify", store, "--deep", "--json").stdout)["problems"] == []
    victim = next(store.glob("parts/*/logits-*/head_index/c/0"))
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 4
    victim.write_bytes(data)
    damaged = run("verify", store, "--deep", code=1)
    assert "head_index" in damaged.stdout


def test_draws_are_extended_and_fewer_are_served(tiny_teacher: Path, corpus: Path, tmp_path: Path) -> None:
    store, head = tmp_path / "store", ("--top-k", 4, "--top-p", 0.6)
    first = generate(tiny_teacher, corpus, store, *head, "--tail", 12, "--seed", 3)
    fewer = generate(tiny_teacher, corpus, store, *head, "--tail", 5, "--seed", 3)
    assert fewer["tokens"] == 0 and first["tokens"]
    more = generate(tiny_teacher, corpus, store, *head, "--tail", 20, "--seed", 3)
    assert more["tokens"] == first["tokens"]
    wide, narrow = LogitsSpec(4, 0.6, 20, seed=3), LogitsSpec(4, 0.6, 5, seed=3)
    old = CacheReader.open(store, str(first["manifest"]))
    new = CacheReader.open(store, str(more["manifest"]))
    assert new.find("logits") == wide
    for index in range(len(new)):
        place = old.sample_ids.index(new.sample_ids[index])
        before = old.read(place, [narrow]).features[narrow]
        np.testing.assert_array_equal(before.tail_ids, new.read(index, [narrow]).features[narrow].tail_ids)


def test_temperatures_are_the_teachers_and_are_added_alone(
    tiny_teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    first = generate(tiny_teacher, corpus, store, "--top-k", 16)
    before, old = files_of(store), {store / f: (store / f).read_bytes() for f in files_of(store)}
    more = generate(tiny_teacher, corpus, store, "--top-k", 16, "--temperatures", "2,0.5")
    assert more["tokens"] == first["tokens"]
    after = files_of(store)
    assert {name: after[name] for name in before} == before
    assert all(file.read_bytes() == data for file, data in old.items())
    new = {name.split("/")[2] for name in set(after) - set(before) if name.startswith("parts/")}
    assert new == {group_id(LseSpec(2)), group_id(LseSpec(0.5))}, "nothing but the small groups is written"
    for request in (("--top-k", 16, "--temperatures", "0.5"), ("--top-k", 0, "--temperatures", "2.0")):
        assert generate(tiny_teacher, corpus, store, *request)["tokens"] == 0
    assert run("verify", store, "--deep").returncode == 0
    assert "lse.T0.5" in run("info", store).stdout

    reader = CacheReader.open(store)
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher).eval()
    for index in (0, len(reader) - 1):
        sample = reader.read(index)
        with torch.inference_mode():
            logits = model(torch.from_numpy(sample.tokens.astype(np.int64))[None]).logits[0].double()
        head = sample.features[LogitsSpec(16)]
        for temperature in (2.0, 0.5):
            found = sample.features[LseSpec(temperature)].lse
            exact = torch.logsumexp(logits / temperature, -1).numpy()
            assert np.abs(found - exact).max() <= LSE_ERROR + 1e-4 / temperature
            logprobs = head.logits.reshape(-1, 16) / temperature - found[:, None]
            wanted = (logits / temperature).log_softmax(-1).topk(16).values.numpy()
            bound = (LOGPROB_ERROR + ROW_ERROR + 2e-4) / temperature + LSE_ERROR
            assert np.abs(logprobs - wanted).max() <= bound


def test_the_error_of_stored_hidden_states_is_measured(
    tiny_teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    """The error that the records and `info` name is the one between an f32 capture and the others."""
    store = tmp_path / "store"
    for dtype in ("f32", "bf16", "int8", "fp8", "int4", "int2"):
        layers = ("--hidden-layers", "1,3", "--hidden-dtype", dtype)
        last = generate(tiny_teacher, corpus, store, "--top-k", 0, "--num-samples", 6, *layers)
    reader = CacheReader.open(store)
    samples = [reader.read(index).features for index in range(len(reader))]
    groups = json.loads(run("info", store, "--json").stdout)["groups"]
    manifest = read_manifest(root_of(store), str(last["manifest"]))
    for layer in (1, 3):
        exact = np.concatenate([s[HiddenSpec(layer, "f32")].to_float32() for s in samples]).astype(np.float64)
        for dtype, least in (
            ("f32", 0.0),
            ("bf16", 1e-4),
            ("int8", 1e-3),
            ("fp8", 1e-2),
            ("int4", 5e-2),
            ("int2", 2e-1),
        ):
            spec = HiddenSpec(layer, dtype)
            stored = np.concatenate([s[spec].to_float32() for s in samples])
            error, norm = np.square(stored - exact).sum(), np.square(exact).sum()
            sums = manifest.stats[group_id(spec)]
            assert sums["squared_norm"] == pytest.approx(norm, rel=1e-5)
            assert sums["squared_error"] == pytest.approx(error, rel=1e-4)
            found = groups[group_id(spec)]["relative_error"]
            assert found == pytest.approx(np.sqrt(error / norm), rel=1e-4) and found >= least
            assert found < (0.4 if dtype == "int2" else 0.1)
    assert "relative error" in run("info", store).stdout


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        ((), "logits"),
        (("--top-k", 0, "--hidden-layers", 1, "--hidden-dtype", "int2"), "states of layer 1"),
        (("--top-k", 0, "--final", "--final-dtype", "klt4"), "states of layer 3"),
    ],
)
def test_a_teacher_that_overflows(
    tiny_teacher: Path, corpus: Path, tmp_path: Path, flags: tuple[object, ...], what: str
) -> None:
    """Its weights are numbers, what it makes of them is not: one line, and nothing is kept."""
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher, dtype=torch.float32)
    with torch.no_grad():
        for weight in (model.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.down_proj.weight):
            weight.mul_(1e30)
    teacher = Path(shutil.copytree(tiny_teacher, tmp_path / "teacher"))
    model.save_pretrained(teacher)
    words = (teacher, corpus, "--out", tmp_path / "store", "--engine", "transformers", "--max-seq-len", 64)
    done = call("distily-cache", "generate", *words, "--dtype", "float32", *flags, code=1)
    line = done.stderr.splitlines()[-1]
    assert f"its {what} are no finite numbers at position" in line and "earlier" in line
    assert not (tmp_path / "store" / "commit").exists() and not [*(tmp_path / "store").rglob("klt4*")]


def test_a_request_for_temperatures_alone(tiny_teacher: Path, corpus: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    assert generate(tiny_teacher, corpus, store, "--top-k", 0, "--temperatures", "4")["tokens"]
    reader = CacheReader.open(store)
    assert list(reader.groups.values()) == [LseSpec(4)]
    assert reader.read(0).features[LseSpec(4)].lse.shape == (reader.lengths[0],)


def test_ls_and_gc(tiny_teacher: Path, corpus: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    made = generate(tiny_teacher, corpus, store, "--top-k", 4)
    shards = json.loads(run("ls", store, "--json").stdout)
    assert sum(shard["rows"] for shard in shards) == made["tokens"] and all(s["complete"] for s in shards)
    assert shards[0]["task"] in run("ls", store).stdout
    orphan = store / "parts" / f"{shards[0]['task']}-feedfeedfeed"
    orphan.mkdir()
    assert "may be in use" in run("gc", store).stdout
    found = json.loads(run("gc", store, "--min-age", 0, "--json").stdout)
    assert [o["removable"] for o in found["orphans"]] == [True] and orphan.exists()
    assert "removed" in run("gc", store, "--min-age", 0, "--delete").stdout and not orphan.exists()
    assert run("verify", store, "--deep").returncode == 0
    run("gc", tmp_path, code=2)
