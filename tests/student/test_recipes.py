"""Recipe files: those of examples/ run, stages follow each other and outlive a kill, errors are one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from student.config.parser import parse
from student.config.recipes import Stage, requests, share_steps, take_recipe
from student.errors import UserError
from tests import teachers
from tests.command import command, generate
from tests.student.test_training import logs, weights
from tests.teachers import text_of

Run = Callable[..., tuple[int, str, str]]
RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
QUICK = ("--per-device-train-batch-size", 4, "--eval-fraction", 0.25, "--report-to", "none", "--json")
SMALL = ("--student-model-config", '{"num_hidden_layers": 2}', "--learning-rate", "1e-3")


@pytest.fixture(scope="module")
def relations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the default distribution, all states and the relations of block 1 of 3."""
    folder = tmp_path_factory.mktemp("relations")
    teacher = teachers.llama(folder / "teacher")
    texts = [json.dumps({"text": text_of(20, seed)}) for seed in range(24)]
    (folder / "data.jsonl").write_text("\n".join(texts))
    layers = ("--relation-layers", 1, "--hidden-layers", "1,2", "--final")
    generate(teacher, folder / "data.jsonl", folder / "cache", *layers)
    return folder / "cache"


def terms(directory: Path) -> set[str]:
    return set(json.loads((directory / "summary.json").read_text())["objective"])


@pytest.mark.parametrize(
    ("recipe", "conversion", "learned"),
    [
        ("bitnet-kd", "none", {"kl"}),
        ("tsld-qat", "subln", {"tsld", "ce"}),
        ("ternary", "subln", {"kl", "hidden_nmse_L3_to_L2"}),
        ("blockwise", "subln", {"kl", "hidden_nmse_L3_to_L2"}),
    ],
)
def test_recipes_of_one_training(
    distily_train: Run, relations: Path, tmp_path: Path, recipe: str, conversion: str, learned: set[str]
) -> None:
    words = (relations, "--recipe", RECIPES / f"{recipe}.yaml", "--output-dir", tmp_path)
    few = ("--blockwise-steps", 4) if recipe == "blockwise" else ()
    code, out, err = distily_train(*words, *QUICK, *SMALL, "--max-steps", 2, *few)
    assert code == 0, err
    summary = json.loads(out)
    assert ("blockwise" in summary) == (recipe == "blockwise")
    assert (summary["steps"], summary["bitnet_conversion"]) == (2, conversion)
    assert terms(tmp_path) == learned


def test_bitdistill_goes_on_after_a_kill_as_if_there_had_been_none(
    distily_train: Run, relations: Path, tmp_path: Path
) -> None:
    def words(directory: Path) -> tuple[object, ...]:
        base = (relations, "--recipe", RECIPES / "bitdistill.yaml", "--output-dir", directory)
        return (*base, *QUICK, *SMALL, "--max-steps", 10, "--save_steps", 1, "--logging_steps", 1)

    code, out, err = distily_train(*words(tmp_path / "straight"))
    assert code == 0, err
    assert "stage pretrain: 1 of 2" in err and "stage distil: 2 of 2" in err
    summary = json.loads(out)
    assert (summary["steps"], summary["bitnet_conversion"]) == (6, "subln")
    straight, first = tmp_path / "straight", tmp_path / "straight" / "pretrain"
    assert json.loads((first / "summary.json").read_text())["steps"] == 4
    assert terms(first) == {"ce"}
    assert terms(straight) == {"kl", "ce", "qkv_relation_L1_to_L1"}
    assert (straight / "report.html").is_file()
    assert any("step0_drift_norms" in entry for entry in logs(first)) and summary["step0_drift"] is None
    # The second stage began with the very student of the first.
    left = json.loads((first / "summary.json").read_text())["last_eval"]
    assert (left["eval_ce"], left["eval_kl"]) == tuple(
        summary["first_eval"][f"eval_{n}"] for n in ("ce", "kl")
    )
    assert summary["last_eval"]["eval_ce"] != left["eval_ce"]

    killed = tmp_path / "killed"
    process = subprocess.Popen(
        command("distily-train", "from-cache", *words(killed)), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 200
    while not (killed / "checkpoint-2" / "trainer_state.json").is_file() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (killed / "summary.json").exists()
    code, out, err = distily_train(*words(killed))
    assert code == 0, err
    assert "stage pretrain: finished before\n" in err
    one, other = weights(straight), weights(killed)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())

    stamps = {file: file.stat().st_mtime_ns for file in killed.rglob("*") if file.is_file()}
    code, out, err = distily_train(*words(killed))
    assert (code, json.loads(out)["steps"]) == (0, 6)
    assert {file: file.stat().st_mtime_ns for file in killed.rglob("*") if file.is_file()} == stamps
    code, _, err = distily_train(*words(killed), "--learning-rate", "1e-4")
    assert code == 2
    assert "stage pretrain: finished before, with --learning-rate 0.001" in err
    assert "all its stages were finished with other flags" in err.splitlines()[-1]


def test_what_is_wrong_in_a_later_stage_is_found_before_the_first(
    distily_train: Run, cache: Path, relations: Path, tmp_path: Path
) -> None:
    words = ("--recipe", RECIPES / "bitdistill.yaml", "--output-dir", tmp_path / "out", *QUICK, *SMALL)
    for store, more, said in (
        (cache, (), "stage distil: --objective: terms[2] (qkv_relation): the cache lacks projections"),
        (relations, ("--max-steps", 1), "--max-steps 1 leaves no step to the stage pretrain"),
        (relations, ("--resume_from_checkpoint", "True"), "resumes by itself"),
    ):
        code, _, err = distily_train(store, *words, *more)
        assert code == 2 and said in err.splitlines()[-1], err
        assert len(err.splitlines()) == 1
        assert not list(tmp_path.rglob("*.safetensors"))
    for number, state in ((1, "{}"), (2, "")):  # whoever wrote the second one was killed at it
        checkpoint = tmp_path / "out" / "pretrain" / f"checkpoint-{number}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "trainer_state.json").write_text(state)
    code, _, err = distily_train(relations, *words)
    assert code == 2 and "holds a model or a training already" in err and "stage pretrain" in err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- 1", "needs a mapping of flags"),
        ("", "needs a mapping of flags"),
        ("x: [", "is not valid YAML"),
        ("bf16: true\nbf16: false", "'bf16' occurs twice"),
        ("logits-loss: !!python/object:os.system {}", "is not valid YAML"),
        ("learning-rte: 1", "unknown flag --learning-rte; did you mean --learning-rate?"),
        ("--bf16: true", "without dashes"),
        ("output-dir: x", "output-dir is of the command line"),
        ("learning-rate: fast", "invalid float value: 'fast'"),
        ("objective: {terms: [{loss: kl, weight: 2020-01-01}]}", "objective cannot be the value of a flag"),
        ("objective: {terms: [{loss: kl}]}\nce-weight: 1", "--objective and --ce-weight exclude each other"),
        ("recipe: x.yaml", "recipe is of the command line"),
        ("stages: []", "stages must be a list of at least one"),
        ("stages: {name: a}", "stages must be a list of at least one"),
        ("stages: [a]", "stages[0] must be a mapping with a key `name`"),
        ("stages: [{name: a}, {share: 1}]", "`share`"),
        ("stages: [{name: a}, {ce-weight: 1}]", "stages[1] must be a mapping with a key `name`"),
        ("stages: [{name: ../a}]", "stages[0]: a stage is named by letters, digits, - and _"),
        ("stages: [{name: checkpoint-7}]", "not checkpoint-"),
        ("stages: [{name: a}, {name: a}]", "there is a stage a already"),
        ("stages: [{name: a, share: 0.5}, {name: b, share: 0.6}]", "`share`"),
        ("stages: [{name: a, share: true}]", "`share`"),
        ("stages: [{name: a, max-steps: 3}]", "stage a: max-steps counts the steps of all stages"),
        (
            "stages: [{name: a}, {name: b, student-model-config: {}}]",
            "stage b: student-model-config is of the",
        ),
        ("stages: [{name: a, ce-wieght: 1}]", "stage a: unknown flag --ce-wieght; did you mean --ce-weight?"),
        ("stages: [{name: a}, {name: b, ce-weight: -1}]", "stage b: --ce-weight must be a finite number"),
    ],
)
def test_a_wrong_file_is_one_line(
    distily_train: Run, cache: Path, tmp_path: Path, text: str, said: str
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    code, out, err = distily_train(cache, "--output-dir", tmp_path / "out", "--recipe", file)
    assert (code, out, len(err.splitlines())) == (2, "", 1), err
    assert said in err
    assert not (tmp_path / "out").exists()


def test_a_recipe_that_is_not_there(distily_train: Run, cache: Path, tmp_path: Path) -> None:
    code, _, err = distily_train(cache, "--output-dir", tmp_path, "--recipe", "no/such.yaml")
    assert code == 2 and "--recipe no/such.yaml cannot be read" in err
    code, _, err = distily_train(cache, "--output-dir", tmp_path, "--recipe")
    assert code == 2 and "--recipe" in err
    with pytest.raises(UserError, match="--recipe"):
        parse(["STORE", "--output-dir", str(tmp_path), "--recipe=x.yaml"])


def test_flags_of_file_stage_and_command_line(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text("terms: [{loss: kl}, {loss: hidden_mse, layer_map: {2: 1}}]")
    (tmp_path / "recipe.yaml").write_text(
        "weight-decay: 0.1\nseed: 1\nnum-train-epochs: 4\nstudent-model-config: {vocab_size: 9}\nstages:\n"
        "- {name: a, share: 0.25, weight_decay: 0.2, seed: 2}\n- {name: b, share: 0.75, objective: t.yaml}"
    )
    words = [
        "--bf16",
        "STORE",
        "--seed",
        "3",
        "--recipe",
        str(tmp_path / "recipe.yaml"),
        "--output-dir",
        "out",
    ]
    path, rest = take_recipe(words)
    assert path is not None
    stages = requests(path, rest)
    assert isinstance(stages, list)
    (one, two) = (stage.request for stage in stages)
    assert [one.stores, one.training.output_dir, two.training.output_dir] == [("STORE",), "out/a", "out"]
    assert [request.training.num_train_epochs for request in (one, two)] == [1, 3]
    assert [request.training.weight_decay for request in (one, two)] == [0.2, 0.1]
    assert [request.training.seed for request in (one, two)] == [3, 3]
    assert (one.options.student, two.options.student) == (None, "out/a")
    assert (one.options.config_changes(), two.options.config_changes()) == ({"vocab_size": 9}, {})
    assert [term.loss.name for term in two.options.wanted().terms] == ["kl", "hidden_mse"]


def test_an_objective_within_a_recipe_keeps_its_numbers(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "objective: {terms: [{loss: hidden_mse, layer_map: {2: 1}, weight: 0.5}]}"
    )
    request: Any = requests(str(tmp_path / "recipe.yaml"), ["STORE", "--output-dir", "out"])
    (term,) = request.options.wanted().terms
    assert (term.layer_map, term.weight.start) == (((2, 1),), 0.5)


def test_steps_are_shared_without_a_rest() -> None:
    stages = [Stage(name, share, {}) for name, share in (("a", 0.3), ("b", 0.3), ("c", 0.4))]
    for total in (3, 10, 11, 1000):
        steps = share_steps(total, stages)
        assert sum(steps) == total
        assert all(abs(n - total * stage.share) <= 1 for n, stage in zip(steps, stages, strict=True))
