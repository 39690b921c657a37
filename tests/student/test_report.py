"""`distily-train report`: what the page says of runs, from their files alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from student.card.results import results
from student.report import RunFiles, read_run, read_runs, runs_page
from student.report.comparison import differing_flags
from student.report.savings import capture_seconds, savings
from student.sweep.results import generation_seconds
from tests import html

Refused = Callable[..., str]
Distily = Callable[..., tuple[int, str, str]]
EVIL = "<script>alert(1)</script>"


def made(directory: Path, summary: dict[str, Any], log: Any = None, evaluation: Any = None) -> Path:
    """A run's directory with these files."""
    directory.mkdir(parents=True)
    files = {"summary.json": summary, "trainer_state.json": {"log_history": log}, "eval.json": evaluation}
    for name, content in files.items():
        if content is not None:
            (directory / name).write_text(json.dumps(content))
    return directory


def full(name: str, kl: float, seconds: float = 100.0) -> dict[str, Any]:
    """Everything that a summary tells today."""
    entry = {"eval_ce": kl + 1, "eval_perplexity": 9.0, "eval_teacher_perplexity": 5.0}
    return {
        "manifest": "ab" * 16,
        "steps": 20,
        "train_samples": 12,
        "held_out_samples": 3,
        "first_eval": {**entry, "step": 0, "eval_kl": 2 * kl},
        "last_eval": {**entry, "step": 20, "eval_kl": kl, "eval_top1_agreement": 0.25},
        "seconds": 7.0,
        "tokens": 1_000,
        "tokens_per_second": 150.0,
        "peak_rss_bytes": 10**9,
        "objective": {"kl": 1.0, name: {"schedule": "linear", "from": 0.0, "to": 2.0, "until": 0.5}},
        "step0_drift": {"norms": 0.1, "quantised": 0.2},
        "sizes": {"student_parameters": 42_472_512, "ternary_parameters": 9, "ternary_share": 0.5},
        "cache_cost": {
            "teacher": "my-teacher",
            "samples": 15,
            "tokens": 2_000,
            "bytes": 80_000,
            "bytes_per_token": 40.0,
            "capture_seconds": seconds,
            "capture_tokens_per_second": 20.0,
            "groups": {"logits": {"bytes": 80_000, "bytes_per_token": 40.0}},
        },
        "command": [
            "distily-train",
            "from-cache",
            "./cache",
            "--output-dir",
            name,
            "--learning_rate",
            "1e-3",
        ],
        "environment": {"python": "3.11.7", "device": "cpu", "cores": 2, "gpu": None},
    }


LOG = [
    {"step": 0, "eval_kl": 3.0, "eval_perplexity": 900.0, "eval_teacher_perplexity": 5.0, "eval_loss": 3.0},
    {"step": 2, "loss": 4.0, "loss_kl": 3.0, "loss_ce": 2.0, "weight_kl": 1.0, "bitnet_zero_share": 0.4},
    {"step": 4, "loss": 2.0, "loss_kl": 1.5, "loss_ce": 1.0, "weight_kl": 1.5, "bitnet_zero_share": 0.5},
    {"step": 4, "eval_kl": 1.0, "eval_perplexity": 9.0, "eval_teacher_perplexity": 5.0, "eval_loss": 1.0},
]
EVALUATION = {
    "version": 1,
    "cache": {
        "student": {"ce": 2.5, "perplexity": 12.2, "kl": 0.75, "top1_agreement": 0.5},
        "teacher": {"ce": 2.0, "perplexity": 7.4},
        "by_position": [
            {"from": 0, "to": 4, "positions": 9, "kl": 1.0, "ce": 3.0, "teacher_ce": 2.0},
            {"from": 4, "to": 16, "positions": 9, "kl": 0.5, "ce": 2.0, "teacher_ce": 1.5},
        ],
        "by_entropy": [{"from": 0.0, "to": None, "positions": 9, "kl": 1.0, "ce": 3.0, "teacher_ce": 2.0}],
    },
    "texts": [
        {"name": "wiki", "tokens": 900, "student": {"perplexity": 33.3}, "teacher": {"perplexity": 20.0}},
        {"name": "book", "tokens": 800, "student": {"perplexity": 44.4}, "teacher": None},
    ],
    "tasks": [
        {
            "task": "glue_sst2",
            "metric": "acc",
            "filter": "none",
            "samples": 8,
            "student": 0.625,
            "student_stderr": 0.125,
            "teacher": None,
            "teacher_stderr": None,
        }
    ],
}


def test_training_writes_the_page_and_the_command_writes_the_same_again(
    train: Callable[..., dict[str, Any]], distily: Distily, tmp_path: Path
) -> None:
    train(tmp_path / "a", "--student-model-config", '{"num_hidden_layers": 2}', "--max_steps", 2)
    written = (tmp_path / "a" / "report.html").read_text()
    page = html.page(written)
    assert "Distillation of a" in page.texts["h1"]
    assert "A 2-layer student of" in written
    (tmp_path / "a" / "report.html").unlink()
    assert distily("report", tmp_path / "a")[:2] == (0, f"{tmp_path / 'a' / 'report.html'}\n")
    assert (tmp_path / "a" / "report.html").read_text() == written
    # Another run with fewer metrics beside it, and JSON.
    made(tmp_path / "b", full("tvd", 0.5), LOG, EVALUATION)
    out = tmp_path / "both.html"
    code, printed, _ = distily("report", tmp_path / "a", tmp_path / "b", "--out", out, "--json")
    assert code == 0
    assert json.loads(printed) == {"report": str(out)}
    both = html.page(out.read_text())
    assert {"a", "b"} <= set(both.texts["th"])
    assert "These runs minimise different losses: only the held-out metrics compare them." in both.texts["p"]


def test_a_page_of_one_run_says_all_that_its_files_do(tmp_path: Path) -> None:
    made(tmp_path / "run", full("tvd", 0.5), LOG, EVALUATION)
    text = runs_page([read_run(tmp_path / "run")])
    page = html.page(text)
    headings = ["Held-out samples", "Before and after", "Training", "Ternary weights", "Evaluation"]
    assert page.texts["h2"] == [*headings, "What the cache cost and saved", "The commands"]
    assert page.texts["pre"] == ["distily-train from-cache ./cache --output-dir tvd --learning_rate 1e-3"]
    assert "run; python 3.11.7; device cpu; cores 2." in page.texts["p"]
    for shown in ("kl + 0→2 · tvd", "calibrated norms alone", "33.3", "0.625 ± 0.125", "glue_sst2"):
        assert shown in text
    charts = [title.split(":")[0] for title in page.texts["title"][1:] if " by " in title]
    assert charts.count("Perplexity") == charts.count("Training loss") == 1
    assert {"KL by position", "Cross-entropy by entropy", "Weights of the terms"} <= set(charts)


def test_several_runs_are_compared_by_what_differs(tmp_path: Path) -> None:
    for name, rate in (("a", "1e-3"), ("b", "1e-4")):
        summary = full(name, 0.5)
        summary["command"] = [*summary["command"][:-1], rate, "--bf16", "--max-steps=20"]
        made(tmp_path / name, summary, LOG)
    runs = read_runs([tmp_path / "a", tmp_path / "b", tmp_path / "a"])
    assert [run.name for run in runs] == ["a", "b"]
    assert runs[0].flags == {"output-dir": "a", "learning-rate": "1e-3", "bf16": "True", "max-steps": "20"}
    assert differing_flags([run.flags for run in runs]) == ["learning-rate"]
    page = html.page(runs_page(runs))
    assert page.texts["h1"] == ["Distillation: 2 runs"]
    assert "--learning-rate" in page.texts["th"] and "1e-4" in page.texts["td"]
    # Both were held out the same samples, so that there is one teacher.
    assert page.texts["li"].count("teacher") == 1


def test_the_break_even_counts_tokens_and_each_cache_once(tmp_path: Path) -> None:
    one, two = full("a", 0.5), full("b", 0.5)
    runs = [read_run(made(tmp_path / name, summary)) for name, summary in (("a", one), ("b", two))]
    # 1,000 tokens at 20 tokens/s, twice; the cache took 100 s.
    assert [one.saved for one in savings(runs)] == [50.0, 50.0]
    assert capture_seconds(runs) == 100.0
    text = runs_page(runs)
    assert "after 2 of them" in text and "100% of what the cache cost" in text
    two["manifest"] = "cd" * 16
    runs[1] = read_run(made(tmp_path / "c", two))
    assert capture_seconds(runs) == 200.0


def test_the_break_even_counts_the_teachers_tokens(tmp_path: Path) -> None:
    """A student of bytes reads four for each of them."""
    summary = full("a", 0.5) | {"tokens_of_both": {"expansion": 4.0}}
    (found,) = savings([read_run(made(tmp_path / "run", summary))])
    assert found.saved == 12.5
    assert generation_seconds(summary) == 12.5


def test_texts_in_the_tokens_of_two_tokenizers_are_shown_in_bits(tmp_path: Path) -> None:
    """A perplexity per token would be better than the teacher's."""
    student, teacher = (
        {"perplexity": 18.5, "bits_per_byte": 5.75},
        {"perplexity": 20.5, "bits_per_byte": 4.75, "tokens": 520},
    )
    texts = [{"name": "book", "tokens": 641, "student": student, "teacher": teacher}]
    run = read_run(made(tmp_path / "run", full("kl", 0.5), LOG, {"texts": texts}))
    page = runs_page([run])
    assert "Bits per byte on texts" in page and "5.75" in page and "18.5" not in page
    (shown,) = [one for one in results(run) if one.dataset == "book"]
    assert (shown.metric, shown.student, shown.teacher) == ("bits_per_byte", 5.75, 4.75)


def test_a_sweep_stands_for_its_finished_runs(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text("{}")
    assert "no run of this sweep has finished yet" in refused("report", tmp_path / "sweep")
    made(tmp_path / "sweep" / "runs" / "k8", full("a", 0.5))
    made(tmp_path / "sweep" / "runs" / "k4", full("b", 0.5))
    (tmp_path / "sweep" / "runs" / "killed").mkdir()
    made(tmp_path / "other" / "k8", full("c", 0.5))
    runs = read_runs([tmp_path / "sweep", tmp_path / "other" / "k8"])
    assert [run.name for run in runs] == ["runs/k4", "runs/k8", "other/k8"]


@pytest.mark.parametrize(
    ("summary", "log", "evaluation"),
    [
        ({}, None, None),
        ({"cache_cost": None, "sizes": [], "objective": [], "last_eval": 3, "command": "x"}, [1, None], {}),
        (
            {"steps": None, "tokens": "many", "cache_cost": {"groups": None, "capture_seconds": "?"}},
            [{"step": 1, "loss": None}, {"loss": 2}, {"step": 2, "loss": 1e300}],
            {"cache": {"by_position": [{"from": 0}, 3], "student": None}, "texts": 4, "tasks": [None, {}]},
        ),
    ],
)
def test_files_that_lack_things_leave_things_out(
    tmp_path: Path, summary: dict[str, Any], log: Any, evaluation: Any
) -> None:
    bare = made(tmp_path / "bare", summary, log, evaluation)
    html.page(runs_page([read_run(bare)]))
    html.page(runs_page(read_runs([bare, made(tmp_path / "full", full("a", 0.5), LOG, EVALUATION)])))


def test_not_a_number_in_a_file_is_no_number(tmp_path: Path) -> None:
    log = [{"step": step, "loss": float("nan"), "eval_kl": float("inf")} for step in range(3)]
    run = read_run(made(tmp_path / "run", {**full("a", 0.5), "seconds": float("nan")}, log))
    assert run.series("loss") == [] and run.number("seconds") is None
    text = runs_page([run])
    assert "nan" not in text and ">inf" not in text and "<svg" not in text


def test_hostile_names_are_escaped(tmp_path: Path) -> None:
    summary = full(EVIL, 0.5)
    summary["cache_cost"] = {
        **summary["cache_cost"],
        "teacher": EVIL,
        "groups": {EVIL: {"bytes_per_token": 1}},
    }
    summary["command"] = [EVIL, EVIL, f"--{EVIL}", EVIL]
    evaluation = {
        "texts": [{"name": EVIL, "student": {"perplexity": 3.0}}],
        "tasks": [{"task": EVIL, "metric": EVIL, "filter": EVIL, "student": 1.0}],
    }
    log = [{"step": step, f"loss_{EVIL}": 1.0, "loss_b": 2.0, f"weight_{EVIL}": 1.0} for step in (1, 2)]
    run = made(tmp_path / "run", summary, log, evaluation)
    other = made(tmp_path / "&amp;", full("b", 0.5), LOG)
    for runs in ([read_run(run)], read_runs([run, other])):
        text = runs_page(runs)
        html.page(text)
        assert EVIL not in text


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000, '"text"'])
def test_a_damaged_file_is_named(tmp_path: Path, refused: Refused, content: str) -> None:
    run = made(tmp_path / "run", full("a", 0.5))
    (run / "trainer_state.json").write_text(content)
    assert f"{run / 'trainer_state.json'} " in refused("report", run)


def test_what_cannot_be_served(tmp_path: Path, refused: Refused) -> None:
    run = made(tmp_path / "run", full("a", 0.5))
    assert f"{tmp_path} has no summary.json; give the --output-dir" in refused("report", run, tmp_path)
    assert "has no summary.json" in refused("report", tmp_path / "missing")
    assert "which is no directory; make it first" in refused(
        "report", run, "--out", tmp_path / "no" / "a.html"
    )
    assert "is a directory; name a file in it" in refused("report", run, "--out", tmp_path)
    assert not list(tmp_path.rglob("*.html"))


def test_a_moved_run_can_be_reported_on(tmp_path: Path) -> None:
    run = made(tmp_path / "run", full("a", 0.5), LOG)
    shutil.move(run, tmp_path / "moved")
    found: RunFiles = read_run(tmp_path / "moved")
    assert "Distillation of moved" in runs_page([found])
