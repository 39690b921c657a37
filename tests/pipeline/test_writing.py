"""Continuations in plain transformers: what is written, that it is kept, and that the teacher scores it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from featurestore.format.codec import LOGPROB_ERROR, ROW_ERROR
from featurestore.format.schema import LogitsSpec
from featurestore.format.written import piece_names, read_piece
from featurestore.maintenance.verify import verify_store
from featurestore.reader import CacheReader
from featurestore.storage.local import LocalRoot
from pipeline.generate.estimate import estimate
from pipeline.generate.run import prepare
from pipeline.writing.plan import seed_of
from pipeline.writing.sampling import draw, uniforms
from student import bitnet
from student.modeling.saving import save_student
from tests.pipeline.writing import (
    END,
    MAX_TOKENS,
    PROMPTS,
    Silent,
    corpus,
    generate,
    request,
    teacher,
    texts_of,
)
from tests.s3 import Bucket
from tests.stores import lasting


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return teacher(tmp_path_factory.mktemp("writing") / "teacher")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus(tmp_path_factory.mktemp("writing") / "corpus.jsonl")


@pytest.fixture(scope="module")
def store(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("writing") / "store"
    done = generate(request(model, data, out))
    assert done.writing is not None and done.writing.new == done.writing.texts == 2 * PROMPTS
    return out


def reference(
    checkpoint: Path, prompt: list[int], numbers: np.ndarray, temperature: float, top_p: float
) -> list[int]:
    """The text on one prompt by whole forward passes: no cache, no padding, no batch."""
    network = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tokens: list[int] = []
    for number in numbers:
        with torch.inference_mode():
            scores = network(torch.tensor([prompt + tokens])).logits[:, -1]
        tokens.append(int(draw(scores, torch.tensor([number]), temperature, top_p)))
        if tokens[-1] == END:
            break
    return tokens


@pytest.mark.parametrize("sampling", [(1.5, 1.0), (1.5, 0.6), (0.0, 1.0)])
def test_texts_are_the_models_own(
    model: Path, data: Path, tmp_path: Path, sampling: tuple[float, float]
) -> None:
    temperature, top_p = sampling
    asked = request(
        model, data, tmp_path / "s", 1 if temperature == 0 else 2, temperature=temperature, top_p=top_p
    )
    prepared = prepare(asked, Silent())
    generate(asked)
    plan = prepare(asked, Silent()).writing
    assert plan is not None and prepared.writing is not None and not plan.missing
    assert {len(job.prompt) for job in plan.jobs} >= {2, 5, 8}, "prompts of one batch are of several lengths"
    for job in plan.jobs[::3]:
        numbers = uniforms(seed_of(0, job.key), MAX_TOKENS)
        wanted = reference(model, job.prompt.tolist(), numbers, temperature, top_p)
        assert plan.found[job.key].tolist() == wanted


def test_samples_are_prompt_and_text_and_end_where_the_writer_ended(store: Path) -> None:
    texts = texts_of(store)
    assert len(texts) == 2 * PROMPTS
    prompts = {prompt for prompt, _ in texts}
    assert len(prompts) == PROMPTS and max(map(len, prompts)) == 8
    ended = [text for _, text in texts if text[-1] == END]
    assert 0 < len(ended) < len(texts)
    assert all(END not in text[:-1] for _, text in texts)
    assert all(len(text) == MAX_TOKENS for _, text in texts if text[-1] != END)


def test_written_samples_are_scored_by_the_teacher(model: Path, store: Path) -> None:
    assert_features_are_of(model, store)


def assert_features_are_of(model: Path, store: Path) -> None:
    reader = CacheReader.open(store)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for index in range(0, len(reader), 5):
        sample = reader.read(index)
        head = sample.features[LogitsSpec(4)]
        with torch.inference_mode():
            logits = network(torch.from_numpy(sample.tokens.astype(np.int64))[None]).logits[0].double()
        exact = logits.log_softmax(-1)
        best = exact.topk(4)
        assert head.ids.reshape(-1, 4).tolist() == best.indices.tolist()
        found = (head.logits.reshape(-1, 4) - head.lse[:, None])[:, 0]
        assert np.abs(found - best.values[:, 0].numpy()).max() <= LOGPROB_ERROR + 1e-4
        labels = torch.from_numpy(sample.tokens[1:].astype(np.int64))[:, None]
        known = exact[:-1].gather(-1, labels)[:, 0].numpy()
        assert np.abs(head.label_logprob[:-1] - known).max() <= ROW_ERROR + 1e-4


def test_the_same_request_writes_the_same_in_any_batches_and_nothing_twice(
    model: Path, data: Path, store: Path, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    generate(request(model, data, again, batch=40))
    assert texts_of(again) == texts_of(store)
    other = tmp_path / "other"
    generate(request(model, data, other, seed=1))
    assert texts_of(other) != texts_of(store)
    before = {file: file.stat().st_mtime_ns for file in again.rglob("*")}
    report = Silent()
    done = generate(request(model, data, again), report)
    assert done.writing is not None and (done.writing.new, done.tokens) == (0, 0)
    assert not any("starting" in stage for stage in report.stages), "no model is loaded"
    assert {file: file.stat().st_mtime_ns for file in again.rglob("*")} == before


def test_more_continuations_and_more_prompts_write_the_new_ones_only(
    model: Path, data: Path, tmp_path: Path
) -> None:
    out, few = tmp_path / "store", corpus(tmp_path / "few.jsonl", 6)
    generate(request(model, few, out, 1))
    first, files = (
        texts_of(out),
        {str(f.relative_to(out)): f.read_bytes() for f in out.rglob("*") if f.is_file()},
    )
    larger = generate(request(model, data, out, 3))
    assert larger.writing is not None
    assert (larger.writing.texts, larger.writing.new) == (3 * PROMPTS, 3 * PROMPTS - 6)
    assert set(first) < set(texts_of(out)) and len(texts_of(out)) == 3 * PROMPTS
    assert all((out / name).read_bytes() == content for name, content in lasting(files).items())
    rows = int(sum(CacheReader.open(out).lengths))
    assert larger.tokens == rows - sum(len(prompt) + len(text) for prompt, text in first)
    assert verify_store(out, deep=True).sound


def test_a_plan_counts_what_is_missing_at_its_longest_and_writes_nothing(
    model: Path, data: Path, store: Path, tmp_path: Path
) -> None:
    out = tmp_path / "none"
    prepared = prepare(request(model, data, out), Silent())
    forecast = estimate(prepared)
    assert not out.exists()
    assert (forecast.texts, forecast.texts_to_write) == (2 * PROMPTS, 2 * PROMPTS)
    assert prepared.writing is not None
    longest = sum(len(job.prompt) + MAX_TOKENS for job in prepared.writing.jobs)
    assert forecast.tokens_to_do == longest >= sum(len(p) + len(t) for p, t in texts_of(store))
    more = estimate(prepare(request(model, data, store, 3), Silent()))
    assert (more.texts, more.texts_to_write) == (3 * PROMPTS, PROMPTS)
    done = estimate(prepare(request(model, data, store), Silent()))
    assert (done.texts_to_write, done.tokens_to_do) == (0, 0)


def test_killed_while_writing_it_goes_on_with_what_is_missing(
    model: Path, data: Path, tmp_path: Path
) -> None:
    out, undisturbed = tmp_path / "store", tmp_path / "undisturbed"
    generate(request(model, data, undisturbed, 6))
    command = [sys.executable, "-m", "tests.pipeline.writing", str(model), str(data), str(out)]
    process = subprocess.Popen(command)
    deadline = time.monotonic() + 120
    while len(list(out.glob("written/*/*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = {file: file.read_bytes() for file in out.glob("written/*/*.json")}
    assert 3 <= len(kept) < len(list(undisturbed.glob("written/*/*.json"))), "the kill came too late"
    assert not (out / "commit").exists(), "nothing is captured before all is written"
    written = sum(len(read_piece(LocalRoot(out), name)[1]) for name in piece_names(LocalRoot(out)))
    done = generate(request(model, data, out, 6))
    assert done.writing is not None and done.writing.new == 6 * PROMPTS - written
    assert all(file.read_bytes() == content for file, content in kept.items())
    assert piece_names(LocalRoot(out)) == piece_names(LocalRoot(undisturbed))
    assert texts_of(out) == texts_of(undisturbed)
    assert verify_store(out, deep=True).sound


def test_a_students_texts_are_its_own_and_the_teachers_features_are_kept(
    model: Path, data: Path, store: Path, tmp_path: Path
) -> None:
    student, out = teacher(tmp_path / "student", seed=5), tmp_path / "store"
    done = generate(request(model, data, out, student=student))
    assert done.writing is not None and done.writing.by == str(student)
    texts = texts_of(out)
    assert {prompt for prompt, _ in texts} == {prompt for prompt, _ in texts_of(store)} and texts != texts_of(
        store
    )
    plan = prepare(request(model, data, out, student=student), Silent()).writing
    assert plan is not None
    for job in plan.jobs[::7]:
        numbers = uniforms(seed_of(0, job.key), MAX_TOKENS)
        assert plan.found[job.key].tolist() == reference(student, job.prompt.tolist(), numbers, 1.5, 1.0)
    assert_features_are_of(model, out)
    # The teacher's own texts come beside them, in the same store.
    both = generate(request(model, data, out))
    assert both.writing is not None and both.writing.new == 2 * PROMPTS
    assert set(texts_of(out)) == set(texts) | set(texts_of(store))
    records = [json.loads(file.read_text())["record"] for file in sorted(out.glob("provenance/*.json"))]
    assert [record["writing"]["by"] for record in records] == [str(student), str(model)]
    assert records[0]["request"]["writing"]["from_student"] == str(student)
    assert records[0]["writing"]["writer"]["digest"] != records[1]["writing"]["writer"]["digest"]


def test_a_ternary_student_writes_as_transformers_runs_it(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint of `distily-train`, against its online layers as `from_pretrained` gives them."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    assert bitnet.convert(network.get_decoder().layers) > 0
    save_student(network, tmp_path / "student", model)
    asked = request(model, data, tmp_path / "store", 1, student=tmp_path / "student")
    generate(asked)
    plan = prepare(asked, Silent()).writing
    assert plan is not None and not plan.missing
    with torch.compiler.set_stance("force_eager"):
        for job in plan.jobs[::3]:
            numbers = uniforms(seed_of(0, job.key), MAX_TOKENS)
            wanted = reference(tmp_path / "student", job.prompt.tolist(), numbers, 1.5, 1.0)
            assert plan.found[job.key].tolist() == wanted


def test_two_commands_at_once_agree_on_every_text(model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    command = [sys.executable, "-m", "tests.pipeline.writing", str(model), str(data), str(out)]
    both = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait(timeout=300) for process in both] == [0, 0]
    alone = tmp_path / "alone"
    generate(request(model, data, alone, 6))
    assert piece_names(LocalRoot(out)) == piece_names(LocalRoot(alone))
    assert texts_of(out) == texts_of(alone)
    records = [json.loads(file.read_text())["record"]["writing"] for file in out.glob("provenance/*.json")]
    assert {record["texts"] for record in records} == {6 * PROMPTS}
    assert verify_store(out, deep=True).sound


def test_in_object_storage(model: Path, data: Path, store: Path, bucket: Bucket) -> None:
    url = bucket.url("written")
    asked = replace(request(model, data, store), out=url)
    done = generate(asked)
    assert done.writing is not None and done.writing.new == 2 * PROMPTS
    bucket.forget()
    before = bucket.names("written")
    again = generate(asked)
    assert again.writing is not None and (again.writing.new, again.tokens) == (0, 0)
    assert bucket.names("written") == before
    ours, theirs = CacheReader.open(url), CacheReader.open(store)
    assert sorted(ours.sample_ids) == sorted(theirs.sample_ids)
