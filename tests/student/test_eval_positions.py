"""eval-samples.json against both models' whole logits in float64, and the page that shows it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from featurestore.format.codec import LOGPROB_ERROR, ROW_ERROR
from featurestore.format.schema import LogitsSpec
from featurestore.reader import CacheReader
from student.evaluation import positions
from student.evaluation.command import evaluate
from student.evaluation.request import CacheOptions, EvalRequest
from student.report import read_run, read_runs, runs_page
from student.report.samples import MOST_STUDENTS
from tests import html
from tests.student.caches import random_samples, write_cache

Distily = Callable[..., tuple[int, str, str]]
EVIL = "</span><script>alert(1)</script>"


def samples_of(student: Path, store: Path) -> dict[str, Any]:
    """What an evaluation of all samples wrote."""
    evaluate(EvalRequest(directory=student, cache=CacheOptions(str(store), all_samples=True)))
    found: dict[str, Any] = json.loads((student / "eval-samples.json").read_text())
    return found


@torch.no_grad()
def logprobs(directory: Path, tokens: list[int]) -> torch.Tensor:
    """Of the whole vocabulary after each token, float64 [T, V]."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)


def test_every_position_is_what_both_models_logits_give(
    full_store: Path, teacher: Path, student: Path
) -> None:
    found, reader = samples_of(student, full_store), CacheReader.open(full_store)
    longest = sorted(range(len(reader)), key=lambda index: -int(reader.lengths[index]))[:2]
    assert [sample["id"] for sample in found["samples"]] == [reader.sample_ids[index] for index in longest]
    for index, shown in zip(longest, found["samples"], strict=True):
        sample = reader.read(index, [])
        tokens = sample.tokens.tolist()
        assert (shown["tokens"], shown["start"], shown["length"]) == (tokens, 0, len(tokens))
        log_p, log_q = logprobs(teacher, tokens), logprobs(student, tokens)
        learned = np.flatnonzero(sample.loss_mask[1:]).tolist()
        assert [row["position"] for row in shown["positions"]] == learned
        for t, row in zip(learned, shown["positions"], strict=True):
            kl = float((log_p[t].exp() * (log_p[t] - log_q[t])).sum())
            assert row["kl"] == pytest.approx(kl, rel=1e-4, abs=1e-6)
            assert row["ce"] == pytest.approx(-float(log_q[t, tokens[t + 1]]), rel=1e-4)
            assert row["teacher_ce"] == pytest.approx(-float(log_p[t, tokens[t + 1]]), abs=ROW_ERROR + 1e-5)
            entropy = -float((log_p[t].exp() * log_p[t]).sum())
            assert row["entropy"] == pytest.approx(entropy, abs=ROW_ERROR + 1e-5)
            top = log_p[t].topk(16)
            assert row["head_mass"] == pytest.approx(float(top.values.exp().sum()), rel=0.01)
            assert [token for token, _ in row["teacher"]] == top.indices[:5].tolist()
            for (_, p), value in zip(row["teacher"], top.values[:5].tolist(), strict=True):
                assert abs(np.log(p) - value) <= LOGPROB_ERROR
            own = log_q[t].topk(5)
            assert [token for token, _ in row["student"]] == own.indices.tolist()
            assert [p for _, p in row["student"]] == pytest.approx(own.values.exp().tolist(), rel=1e-4)
    texts = found["texts"]
    assert {str(token) for sample in found["samples"] for token in sample["tokens"]} <= set(texts)
    assert texts["3"] == " the"


def test_mean_over_a_cache_of_two_samples_is_the_evaluations(
    teacher: Path, student: Path, tmp_path: Path
) -> None:
    """Of stored heads alone: the same lower bound at each position as in the mean."""
    store = write_cache(tmp_path / "two", teacher, random_samples(2, 199), [LogitsSpec(16)])
    found = samples_of(student, store)
    cache = json.loads((student / "eval.json").read_text())["cache"]
    kls = [row["kl"] for sample in found["samples"] for row in sample["positions"]]
    assert len(kls) == cache["positions"]
    assert np.mean(kls) == pytest.approx(cache["student"]["kl"], rel=1e-4)


def test_long_samples_are_shown_from_shortly_before_what_is_learned(
    full_store: Path, student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(positions, "MOST_TOKENS", 6)
    monkeypatch.setattr(positions, "TOKENS_BEFORE", 2)
    monkeypatch.setattr(positions, "MOST_SAMPLES", 12)
    found, reader = samples_of(student, full_store), CacheReader.open(full_store)
    starts = set()
    for shown in found["samples"]:
        sample = reader.read(reader.sample_ids.index(shown["id"]), [])
        first = int(np.flatnonzero(sample.loss_mask[1:])[0])
        starts.add(shown["start"])
        assert shown["start"] == max(0, first + 1 - 2)
        window = sample.tokens[shown["start"] : shown["start"] + 6].tolist()
        assert shown["tokens"] == window
        assert [row["position"] for row in shown["positions"]] == [
            t for t in range(len(sample.tokens) - 1) if sample.loss_mask[t + 1] and t + 1 < shown["start"] + 6
        ]
    assert len(starts) > 2


def test_the_page_sets_teacher_and_students_side_by_side(
    distily: Distily, student: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(student, tmp_path / "other"))
    for directory in (student, other):
        code, _, err = distily("eval", directory)
        assert code == 0, err
    found = json.loads((student / "eval-samples.json").read_text())
    positions_shown = [row for sample in found["samples"] for row in sample["positions"]]
    out = tmp_path / "both.html"
    assert distily("report", student, other, "--out", out)[0] == 0
    page = html.page(out.read_text())
    assert "Samples, token by token" in page.texts["h2"]
    assert (
        "The KL takes what is outside the stored head as one bucket: it is a lower bound." in page.texts["p"]
    )
    # Three columns for each token, of five alternatives each.
    assert len(page.texts["small"]) == 3 * len(positions_shown)
    assert len(page.texts["bdi"]) == 15 * len(positions_shown)
    assert page.texts["b"].count("other") == page.texts["b"].count("student") == len(positions_shown)
    row = positions_shown[0]
    step = sum(row["kl"] > edge for edge in (0.01, 0.1, 0.5, 1.5))
    entropy = sum(row["entropy"] > edge for edge in (0.1, 0.5, 1.5, 3.0))
    assert (
        next(one for one in page.attributes["class"] if one.startswith("s0"))
        == f"s0{step} s1{step} s2{entropy}"
    )
    assert page.texts["small"][1] == (
        f"KL {row['kl']:.3g} nats · p {np.exp(-row['ce']):.3g} · log p {-row['ce']:z.2f}"
    )
    assert {"KL of student, nats", "KL of other, nats", "best of the teacher"} <= set(page.texts["th"])
    alone = html.page(runs_page([read_run(student)]))
    assert len(alone.texts["small"]) == 2 * len(positions_shown)
    assert "KL of the student" in alone.texts["label"]


def test_samples_of_other_weights_or_of_another_cache_are_not_shown(
    distily: Distily, student: Path, full_store: Path, tmp_path: Path
) -> None:
    assert distily("eval", student)[0] == 0
    assert read_run(student).samples
    record = json.loads((student / "eval.json").read_text())
    for changed in (
        record | {"weights": "other"},
        record | {"cache": None},
        record | {"cache": record["cache"] | {"manifest": "ab"}},
        {key: value for key, value in record.items() if key != "weights"},
    ):
        (student / "eval.json").write_text(json.dumps(changed))
        assert not read_run(student).samples
        assert "Samples, token by token" not in runs_page([read_run(student)])
    # As an evaluation of an earlier version left it.
    (student / "eval.json").write_text(json.dumps(record))
    (student / "eval-samples.json").unlink()
    assert "Samples, token by token" not in html.page(runs_page([read_run(student)])).texts["h2"]
    # Students of two caches do not stand beside each other.
    other = Path(shutil.copytree(student, tmp_path / "other"))
    assert distily("eval", student)[0] == 0
    samples_of(other, full_store)
    page = html.page(runs_page(read_runs([student, other])))
    rows = [
        len(sample["positions"])
        for directory in (student, other)
        for sample in json.loads((directory / "eval-samples.json").read_text())["samples"]
    ]
    assert len(page.texts["small"]) == 2 * sum(rows)


def made(directory: Path, samples: dict[str, Any]) -> Path:
    """A run that was evaluated on cache `c`, with these samples."""
    directory.mkdir()
    files = {
        "summary.json": {},
        "eval.json": {"weights": "w", "cache": {"manifest": "c", "exactness": {"kl": "unbiased"}}},
        "eval-samples.json": {"weights": "w", "manifest": "c"} | samples,
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))
    return directory


def hostile() -> dict[str, Any]:
    row = {
        "position": 0,
        "kl": -0.1,
        "ce": -1e-7,
        "entropy": 0.5,
        "teacher": [[1, 0.5]],
        "student": [[2, 0.5]],
    }
    return {
        "samples": [{"id": EVIL, "length": 2, "tokens": [1, 2], "positions": [row]}],
        "texts": {"1": EVIL, "2": "\u202e\x00"},
    }


def test_hostile_tokens_are_escaped(tmp_path: Path) -> None:
    text = runs_page([read_run(made(tmp_path / "run", hostile()))])
    page = html.page(text)
    assert EVIL not in text and "\u202e" not in text and "\x00" not in text
    assert page.texts["bdi"] == [repr(EVIL), "'\\u202e\\x00'"]
    assert any("that of a single position scatters" in said for said in page.texts["p"])


def test_a_page_of_many_students_is_bounded(tmp_path: Path) -> None:
    runs = read_runs([made(tmp_path / f"r{place}", hostile()) for place in range(MOST_STUDENTS + 3)])
    page = html.page(runs_page(runs))
    assert len(page.texts["small"]) == MOST_STUDENTS + 1
    assert any(f"The first {MOST_STUDENTS} of {len(runs)} students" in said for said in page.texts["p"])


@pytest.mark.parametrize(
    "samples",
    [
        {},
        {"samples": 3, "texts": []},
        {"samples": [None, {}, {"tokens": "x", "positions": [3, {}, {"position": "1"}]}]},
        {
            "samples": [
                {"tokens": [1, None, 2.0], "positions": [{"position": 0, "teacher": [[1], [], 3, [1, "x"]]}]}
            ]
        },
        {
            "samples": [{"tokens": [1, 2], "positions": [{"position": 0, "kl": None, "ce": "?"}]}],
            "texts": {"2": 5},
        },
    ],
)
def test_files_that_lack_things_leave_things_out(tmp_path: Path, samples: dict[str, Any]) -> None:
    html.page(runs_page(read_runs([made(tmp_path / "a", samples), made(tmp_path / "b", hostile())])))
