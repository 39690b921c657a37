"""`distily-train card`: what the hub's own reader and a Markdown parser find in it, and that it is true."""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from markdown_it import MarkdownIt
from markdown_it.token import Token

from distily.safety.markdown import line
from featurestore.format.schema import LogitsSpec
from featurestore.store import FeatureStore
from student.card.names import is_hub_name
from tests.student.caches import random_samples, write_cache
from tests.student.exports import Students

Distily = Callable[..., tuple[int, str, str]]
Refused = Callable[..., str]
EVIL = "a\"b'\n---\n| x | ``` \\| <b>bold</b> [l](u) *i* $y$ # é"
SUMMARY: dict[str, Any] = {
    "cache": "cache",
    "manifest": "ab" * 16,
    "steps": 20,
    "held_out_kl": "lower bound",
    "last_eval": {"eval_kl": 0.1 + 0.2, "eval_perplexity": 9.125, "eval_teacher_perplexity": 5.0, "step": 20},
    "tokens": 1_000,
    "objective": {"hidden_cosine_L2_to_L1_2": {"schedule": "linear", "from": 0, "to": 2, "until": 0.5}},
    "cache_cost": {
        "teacher": "some-org/A_teacher.v2",
        "capture_seconds": 100.0,
        "capture_tokens_per_second": 20.0,
        "groups": {"logits": {"bytes": 80_000, "bytes_per_token": 40.0}},
    },
    "captures": [{"argv": ["/usr/bin/distily-cache", "generate", "x"], "dataset": "org/data"}],
    "command": ["distily-train", "from-cache", "cache"],
}


def made(directory: Path, summary: dict[str, Any], evaluation: Any = None) -> Path:
    """A run's directory with these files."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "summary.json").write_text(json.dumps(summary))
    if evaluation is not None:
        (directory / "eval.json").write_text(json.dumps(evaluation))
    return directory


def card_of(distily: Distily, directory: Path, *arguments: object) -> tuple[ModelCard, list[Token]]:
    """The card as the hub reads it, and its text as Markdown; its metadata survives both ways."""
    code, out, err = distily("card", directory, "--json", *arguments)
    assert code == 0, err
    assert json.loads(out) == {"card": str(directory / "README.md")}
    card = ModelCard.load(directory / "README.md")
    again = ModelCard(card.content)
    assert again.data.to_dict() == card.data.to_dict()
    if card.data.eval_results:
        index = eval_results_to_model_index(card.data.model_name, card.data.eval_results)
        assert model_index_to_eval_results(index) == (card.data.model_name, card.data.eval_results)
    return card, MarkdownIt("commonmark").enable("table").parse(card.text)


def values(card: ModelCard) -> dict[tuple[str, str], float]:
    return {(one.dataset_name, one.metric_type): one.metric_value for one in card.data.eval_results or []}


def tables(tokens: list[Token]) -> list[list[list[str]]]:
    """The cells' Markdown, by table and row."""
    found: list[list[list[str]]] = []
    for before, token in itertools.pairwise(tokens):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif before.type in ("th_open", "td_open"):
            found[-1][-1].append("".join(child.content for child in token.children or []))
    return found


def headings(tokens: list[Token]) -> list[str]:
    pairs = itertools.pairwise(tokens)
    return [token.content for before, token in pairs if before.type == "heading_open"]


def code(tokens: list[Token], language: str) -> list[str]:
    return [token.content for token in tokens if token.type == "fence" and token.info == language]


def images(tokens: list[Token]) -> list[str]:
    inline = [child for token in tokens for child in token.children or []]
    return [str(child.attrs["src"]) for child in inline if child.type == "image"]


@pytest.fixture
def own_cache(tmp_path: Path, teacher: Path) -> Path:
    """A cache whose record says what it was made of."""
    path = write_cache(tmp_path / "cache", teacher, random_samples(12, 199), [LogitsSpec(16)])
    argv = [str(tmp_path / "bin" / "distily-cache"), "generate", str(teacher), "org/data", "--out", str(path)]
    request = {"dataset": "org/data", "dataset_config": None, "split": "train"}
    FeatureStore.open(path).add_provenance({"argv": argv, "request": request})
    return path


@pytest.mark.usefixtures("eager")
def test_a_training_has_a_card_that_is_true(
    distily: Distily, own_cache: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["from-cache", str(own_cache), "--output-dir", str(tmp_path / "run"), "--max_steps", "2"]
    words += ["--student-model-config", '{"num_hidden_layers": 2}', "--student-model-as-bitnet"]
    words += ["--bitnet-conversion", "subln", "--eval-fraction", "0.25", "--report-to", "none"]
    ended, _, err = distily(*words, "--hub-token", "hf_secret", "--hub_token=hf_secret")
    assert ended == 0, err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["command"] == ["distily-train", *words, "--hub-token", "***", "--hub_token=***"]
    kept = list((tmp_path / "run").rglob("training_args.bin"))
    assert len(kept) > 1, "a checkpoint has it too"
    assert not any(
        b"hf_secret" in path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()
    )
    environment = summary["environment"]
    assert set(environment) == {"python", "torch", "transformers", "device", "cpu", "cores", "started"}

    card, tokens = card_of(
        distily, tmp_path / "run", "--license", "apache-2.0", "--language", "en", "--language", "no"
    )
    assert str(tmp_path) not in card.content and str(teacher.parent) not in card.content
    data = card.data.to_dict()
    assert (data["license"], data["language"], data["library_name"]) == (
        "apache-2.0",
        ["en", "no"],
        "transformers",
    )
    assert (data["datasets"], data["pipeline_tag"]) == (["org/data"], "text-generation")
    assert data["tags"] == ["distily-cache", "knowledge-distillation", "bitnet", "1.58-bit"]
    assert "base_model" not in data  # a directory is none
    assert {metric: value for (_, metric), value in values(card).items()} == {
        name: summary["last_eval"][f"eval_{name}"] for name in ("kl", "top1_agreement", "perplexity")
    }
    assert images(tokens) == ["card-kl.png", "card-perplexity.png"]
    assert all((tmp_path / "run" / file).read_bytes()[:4] == b"\x89PNG" for file in images(tokens))
    generated, trained = map(shlex.split, code(tokens, "bash"))
    assert generated == ["distily-cache", "generate", teacher.name, "org/data", "--out", "cache"]
    assert trained[:5] == ["distily-train", "from-cache", "cache", "--output-dir", "run"]
    assert trained[5:] == summary["command"][5:]
    assert "Absolute paths are cut to their last name." in card.text
    shown = {row[0]: row[1:] for table in tables(tokens) for row in table}
    assert shown["layers"] == ["3", "2"] and shown["hidden size"] == ["64", "64"]
    assert shown["norms added for BitNet"] == ["–", "subln"]
    assert shown["manifest"] == [summary["manifest"]]
    assert shown["teacher's digest"] == ["ab" * 16]
    assert shown["kl"][1] == "T² Σ p log(p / q)" and "(https://arxiv.org/abs/1503.02531)" in card.content
    monkeypatch.chdir(tmp_path)
    (snippet,) = code(tokens, "python")
    exec(snippet, {})


@pytest.mark.usefixtures("eager")
def test_a_student_that_transformers_refuses_is_loaded_as_the_card_says(
    distily: Distily, students: Students, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = students("qwen3", conversion="subln")
    card, tokens = card_of(distily, made(student, SUMMARY))
    assert card.data.library_name == "distily-cache"
    monkeypatch.chdir(student.parent)
    (snippet,) = code(tokens, "python")
    assert "load_student" in snippet
    for file in (student / "tokenizer").glob("*.json"):
        (student / file.name).write_bytes(file.read_bytes())
    exec(snippet, {})


def test_every_number_is_that_of_its_file(distily: Distily, tmp_path: Path) -> None:
    evaluation = {
        "cache": {
            "manifest": "cd" * 16,
            "student": {"kl": 1 / 3, "top1_agreement": 0.5, "perplexity": 12.25, "ce": 2.5},
            "teacher": {"perplexity": 7.5},
        },
        "texts": [
            {"name": "wiki", "source": "org/wiki", "revision": "abc", "student": {"perplexity": 33.3}},
            {"name": "book", "source": "/home/me/book.txt", "student": {"perplexity": 1e-5}, "teacher": None},
        ],
        "tasks": [
            {"task": "sst2", "dataset": "glue", "metric": "acc", "filter": "none", "student": 0.625}
            | {"student_stderr": 0.125, "teacher": 0.75, "teacher_stderr": None},
            {"task": "gsm", "dataset": "org/gsm", "metric": "exact", "filter": "strict", "student": 0},
            {"task": "gsm", "dataset": "org/gsm", "metric": "exact", "filter": "loose", "student": 0.1},
            {"task": "nothing", "dataset": None, "metric": "acc", "filter": None, "student": None},
        ],
    }
    card, tokens = card_of(distily, made(tmp_path / "run", SUMMARY, evaluation))
    found = {
        (one.dataset_type, one.dataset_config, one.dataset_revision, one.metric_type, one.metric_config): (
            one.metric_value
        )
        for one in card.data.eval_results or []
    }
    assert found == {
        ("distily-cache", None, "cd" * 16, "kl", None): 1 / 3,
        ("distily-cache", None, "cd" * 16, "top1_agreement", None): 0.5,
        ("distily-cache", None, "cd" * 16, "perplexity", None): 12.25,
        ("org/wiki", "wiki", "abc", "perplexity", None): 33.3,
        ("text", "book", None, "perplexity", None): 1e-5,
        ("glue", "sst2", None, "acc", None): 0.625,
        ("org/gsm", "gsm", None, "exact", "strict"): 0,
        ("org/gsm", "gsm", None, "exact", "loose"): 0.1,
    }
    results = tables(tokens)[0]
    assert ["held-out samples of the cache", "perplexity", "12.25", "7.5"] in results
    assert ["sst2", "acc", "0.625 ± 0.125", "0.75"] in results
    assert ["gsm", "exact (strict)", "0", "–"] in results
    assert (card.data.base_model, card.data.datasets) == ("some-org/A_teacher.v2", ["org/data"])
    assert "the cache pays after 2 students like it" in card.text  # 100 s, and 1000 tokens at 20 a second
    assert "a lower bound of the full one" in card.text
    assert "Absolute paths are cut" not in card.text
    assert "0 to 2 (linear, until 0.5 of the steps)" in tables(tokens)[1][1]
    over = SUMMARY | {"held_out_kl": "over the student's first tokens"}
    card, _ = card_of(distily, made(tmp_path / "over", over))
    assert "The KL is over the student's first tokens" in card.text
    # Without eval.json: the last evaluation of the training.
    (tmp_path / "run" / "eval.json").unlink()
    card, _ = card_of(distily, tmp_path / "run")
    assert [one.metric_value for one in card.data.eval_results or []] == [0.1 + 0.2, 9.125]


def test_names_break_nothing(distily: Distily, tmp_path: Path) -> None:
    plain, evil = ({**SUMMARY, **named(name)} for name in ("plain", EVIL))
    expected = card_of(distily, made(tmp_path / "plain", plain, scores("plain")))
    directory = made(tmp_path / EVIL.replace("/", "⁄"), evil, scores(EVIL))
    card, tokens = card_of(distily, directory)
    assert headings(tokens)[1:] == headings(expected[1])[1:]
    assert [token.type for token in tokens] == [token.type for token in expected[1]]
    one_line = " ".join(EVIL.split())
    shape = [[len(row) for row in table] for table in tables(expected[1])]
    assert [[len(row) for row in table] for table in tables(tokens)] == shape
    assert not any(child.type != "text" for cell in inline_cells(tokens) for child in cell)
    assert {one.dataset_name for one in card.data.eval_results or []} >= {one_line}
    assert values(card).keys() == {
        (one_line if name == "plain" else name, one_line if metric == "plain" else metric)
        for name, metric in values(expected[0])
    }
    # What a shell makes of the commands is what was typed.
    assert [shlex.split(block) for block in code(tokens, "bash")] == [
        ["distily-cache", EVIL],
        ["distily-train", EVIL],
    ]


def named(name: str) -> dict[str, Any]:
    """The parts of a summary that hold names."""
    return {
        "manifest": name,
        "bitnet_conversion": name,
        "objective": {name: 1.0},
        "teacher": {"architecture": name, "digest": name, "dtype": name, "quantization": name},
        "cache_cost": {"teacher": name, "engine": name, "groups": {name: {"bytes": 1}}},
        "captures": [{"argv": ["distily-cache", name], "dataset": name}],
        "command": ["distily-train", name],
        "environment": {name: name},
    }


def scores(name: str) -> dict[str, Any]:
    """An evaluation with such names."""
    task = {"task": name, "dataset": name, "metric": name, "filter": name, "student": 0.5}
    text = {"name": name, "source": name, "revision": name, "student": {"perplexity": 2.0}}
    return {"texts": [text], "tasks": [task]}


def inline_cells(tokens: list[Token]) -> list[list[Token]]:
    pairs = itertools.pairwise(tokens)
    return [token.children or [] for before, token in pairs if before.type == "td_open"]


@pytest.mark.parametrize(
    "summary",
    [
        {},
        {
            "cache_cost": None,
            "sizes": [],
            "objective": [],
            "last_eval": 3,
            "command": "x",
            "captures": [1, {}],
        },
        {"teacher": 1, "cache_cost": {"groups": 3, "teacher": []}, "environment": [], "cache": 7},
        {"captures": [{"argv": 3, "dataset": 4}], "command": [], "objective": {"kl": None}, "tokens": "many"},
    ],
)
def test_what_a_summary_does_not_say_is_left_out(
    distily: Distily, tmp_path: Path, summary: dict[str, Any]
) -> None:
    card, tokens = card_of(distily, made(tmp_path / "run", summary))
    assert card.data.eval_results is None and card.data.base_model is None
    assert headings(tokens)[:3] == ["run", "Use", "Results"]


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("/home/me/my cache", "my cache"),
        ("--output-dir=/home/me/out", "--output-dir=out"),
        ("file:///home/me/data.jsonl", "data.jsonl"),
        ("~/models/teacher", "teacher"),
        ('{"a": "/home/me/x", "b": 1}', '{"a": "x", "b": 1}'),
        ("run/cache", "run/cache"),
        ("s3://bucket/a/b", "s3://bucket/a/b"),
        ("https://host/a/b", "https://host/a/b"),
        ("KL(p/q/r)", "KL(p/q/r)"),
    ],
)
def test_a_card_names_no_place_of_one_machine(word: str, shown: str) -> None:
    assert line(word) == shown


def test_hub_names(tmp_path: Path) -> None:
    (tmp_path / "run" / "teacher").mkdir(parents=True)
    near = tmp_path / "run" / "cache"
    for name in ("org/name", "Org-1/na.me_2"):
        assert is_hub_name(name, near)
    for name in ("name", "a/b/c", "/a", "./a", "../a", "a/b.jsonl", "a/b c", "a/b\n", "a/-b", "a/b--c", None):
        assert not is_hub_name(name, near)
    assert is_hub_name("an-org/a-model", Path("elsewhere"))
    assert not is_hub_name("run/teacher", near)


def test_what_is_refused(refused: Refused, tmp_path: Path) -> None:
    assert "has no summary.json; give the --output-dir" in refused("card", tmp_path)
    run = made(tmp_path / "run", SUMMARY)
    assert "is no identifier of the hub" in refused("card", run, "--license", "Apache 2.0")
    assert "is no language code" in refused("card", run, "--language", "English")
    (run / "README.md").mkdir()
    assert "README.md is a directory" in refused("card", run)
