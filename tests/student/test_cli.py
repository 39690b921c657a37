"""The command line: flags in any order and spelling, and every bad request one clear line with exit
code 2.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from featurestore.format.schema import LogitsSpec
from student.config import help
from student.config.flags import CommandOptions
from student.config.help import _TRAINING
from student.config.parser import parse
from student.config.training_config import DistillationConfig
from student.errors import UserError
from student.modeling import plan as build
from tests import teachers
from tests.command import call
from tests.student.caches import random_samples, write_cache

Run = Callable[..., tuple[int, str, str]]
Refuse = Callable[..., str]


@pytest.fixture
def refuse(distily_train: Run, monkeypatch: pytest.MonkeyPatch) -> Refuse:
    """Runs a request in which building the student is an error; the one line on standard error."""

    def built_too_early(plan: build.StudentPlan) -> None:
        raise AssertionError("the student was built before the request was checked")

    monkeypatch.setattr(build.StudentPlan, "build", built_too_early)

    def run(*arguments: object) -> str:
        code, out, err = distily_train(*arguments)
        assert code == 2, err
        assert out == ""
        assert len(err.splitlines()) == 1, err
        assert err.startswith("distily-train: ")
        return err

    return run


def test_flags_in_any_order_and_both_spellings(tmp_path: Path) -> None:
    spellings = [
        ["STORE", "--output_dir", str(tmp_path), "--student_model_as_bitnet", "True", "--bf16", "True"],
        ["--student-model-as-bitnet", "--output-dir", str(tmp_path), "--bf16", "STORE"],
        ["--bf16=True", "STORE", "--student_model_as_bitnet=true", f"--output-dir={tmp_path}"],
        ["--output_dir", str(tmp_path), "--json", "STORE", "--student-model-as-bitnet", "yes", "--bf16", "1"],
    ]
    for argv in spellings:
        request = parse(argv)
        assert request.stores == ("STORE",)
        assert request.training.output_dir == str(tmp_path)
        assert request.options.student_model_as_bitnet is True
        assert request.training.bf16 is True


def test_an_optimizer_without_its_package_is_refused(
    refuse: Refuse, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("student.config.trainer_checks.find_spec", lambda _package: None)
    line = refuse(cache, "--output-dir", tmp_path / "out", "--optim", "paged_adamw_32bit")
    assert "--optim paged_adamw_32bit needs bitsandbytes" in line


def test_our_defaults_yield_to_explicit_flags(tmp_path: Path) -> None:
    default = parse(["STORE", "--output-dir", str(tmp_path)]).training
    assert (default.eval_strategy, default.eval_on_start, default.remove_unused_columns) == (
        "steps",
        True,
        False,
    )
    flags = [
        "--eval_strategy",
        "no",
        "--eval_on_start",
        "False",
        "--save_steps",
        "7",
        "--learning_rate",
        "1e-5",
    ]
    explicit = parse(["STORE", "--output-dir", str(tmp_path), *flags]).training
    assert (explicit.eval_strategy, explicit.eval_on_start) == ("no", False)
    assert (explicit.save_steps, explicit.learning_rate) == (7, 1e-5)


def test_short_runs_are_not_evaluated_at_every_step(tmp_path: Path) -> None:
    best = ("--load-best-model-at-end", "--save-steps", "0.5")
    for flags, expected in (
        ([], 0.1),
        (["--max-steps", "8"], 5),
        (["--max-steps", "50"], 0.1),
        (["--max-steps", "8", "--eval-steps", "0.1"], 0.1),
        (["--max-steps", "8", *best], 0.1),
    ):
        assert parse(["STORE", "--output-dir", str(tmp_path), *flags]).training.eval_steps == expected, flags


def test_metrics_that_fall_are_better_when_lower(tmp_path: Path) -> None:
    for flags, expected in (
        (["--metric-for-best-model=eval_kl"], False),
        (["--metric-for-best-model=kl", "--greater-is-better", "True"], True),
        (["--metric_for_best_model", "top1_agreement", "--load-best-model-at-end"], True),
        (["--metric_for_best_model", "perplexity", "--load-best-model-at-end"], False),
    ):
        args = parse(["STORE", "--output-dir", str(tmp_path), *flags]).training
        assert args.greater_is_better is expected, flags


def test_help_shows_all_of_ours_and_the_usual_of_theirs(distily_train: Run) -> None:
    code, out, _ = distily_train("--help")
    assert code == 0
    assert all(f"--{field.name.replace('_', '-')}" in out for field in fields(CommandOptions))
    assert out.index("--student-model-config") < out.index("--learning-rate") < out.index("--bitnet-backward")
    assert "--help-all" in out and "--deepspeed" not in out


def test_help_and_misspelt_flags_import_nothing_heavy() -> None:
    """torch and transformers take ten seconds of a slow processor."""
    program = (
        "import sys; from student.cli import main\n"
        "sys.argv = ['distily-train', 'from-cache', *sys.argv[1:]]\n"
        "try: main()\n"
        "except SystemExit as stop: print(stop.code or 0, {'torch', 'transformers'} & set(sys.modules))"
    )
    for words, code, said in (
        (["--help"], 0, "--student-model-config"),
        (["x", "--output-dir", "y", "--learning-rat=3"], 2, "did you mean --learning-rate?"),
    ):
        command = [sys.executable, "-c", program, *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == f"{code} set()"
        assert said in done.stdout + done.stderr


def test_their_flags_are_known_by_name() -> None:
    assert help.training_arguments() == {field.name for field in fields(TrainingArguments)}


def test_all_of_help_teaches_our_flags_first(distily_train: Run) -> None:
    code, out, _ = distily_train("--help-all")
    assert code == 0
    assert "--student-model-config" in out
    assert out.index("--student-model-as-bitnet") < out.index("--output-dir OUTPUT_DIR")
    assert out.index("--layer-map") < out.index("--learning-rate LEARNING_RATE")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--student-model-confg", "{}"], ["--student-model-confg", "--student-model-config"]),
        (["--learning_rate", "fast"], ["--learning_rate", "fast"]),
        (["--init", "magic"], ["--init", "random"]),
        (["--eval_strategy", "often"], ["often"]),
        (["another"], ["another", "one place"]),
        (["--student-model-config", "{num_hidden_layers: 2}"], ["--student-model-config", "JSON"]),
        (["--student-model-config", "[2]"], ["--student-model-config", "object"]),
        (["--student-model-config", '{"num_hiden_layers": 2}'], ["num_hiden_layers", "num_hidden_layers"]),
        (["--student-model-config", '{"num_hidden_layers": 0}'], ["num_hidden_layers"]),
        (["--student-model-config", '{"num_attention_heads": "two"}'], ["--student-model-config"]),
        (["--student-model-config", '{"vocab_size": 300}'], ["300", "199", "vocabulary"]),
        (["--student-model-config", '{"max_position_embeddings": 8}'], ["8 positions", "--max-seq-len"]),
        (["--student-model-config", '{"num_hidden_layers": 9}'], ["--copy-layers", "--init random"]),
        (["--copy-layers", "0,1"], ["--copy-layers", "3"]),
        (["--student", "no/such/model"], ["--student", "no/such/model"]),
        (["--student", "x", "--student-model-config", "{}"], ["--student", "--student-model-config"]),
        (["--teacher", "no/such/dir"], ["--teacher", "no/such/dir"]),
        (["--hidden-loss", "mse", "--layer-map", "1:1,4:2"], ["--layer-map", "4", "0 (embeddings) to 3"]),
        (["--hidden-loss", "mse", "--layer-map", "1:5"], ["--layer-map", "student index 5"]),
        (["--hidden-loss", "mse", "--layer-map", "1-1"], ["--layer-map", "10:4,20:8"]),
        (["--hidden-loss", "mse", "--hidden-layers", "2"], ["hidden.L2", "--hidden-layers 2"]),
        (["--hidden-loss", "mse", "--hidden-layers", "7"], ["--hidden-layers", "7"]),
        (["--hidden-loss", "mse", "--hidden-layers", "one"], ["--hidden-layers", "10,20"]),
        (["--hidden-layers", "1"], ["--hidden-layers", "--hidden-loss"]),
        (["--logits-loss", "none"], ["--ce-weight"]),
        (["--logits-loss", "skew"], ["--logits-loss skew", "did you mean skew_kl?"]),
        (["--logits-loss", "full_kl"], ["--logits-loss full_kl", "--final"]),
        (["--ce-weight", "-1"], ["--ce-weight"]),
        (["--eval-fraction", "1.5"], ["--eval-fraction"]),
        (["--eval-fraction", "0.0001"], ["--eval-fraction", "held-out"]),
        (["--resume_from_checkpoint", "True"], ["--resume-from-checkpoint", "no checkpoint"]),
        (["--resume_from_checkpoint", "no/such"], ["--resume-from-checkpoint", "no/such"]),
    ],
)
def test_bad_requests(
    arguments: list[str], words: list[str], refuse: Refuse, cache: Path, tmp_path: Path
) -> None:
    line = refuse(cache, "--output-dir", tmp_path / "out", *arguments)
    assert all(word in line for word in words), line
    assert not (tmp_path / "out").exists()


def test_missing_store_and_missing_arguments(refuse: Refuse, cache: Path, tmp_path: Path) -> None:
    assert "no/such/store" in refuse("no/such/store", "--output-dir", tmp_path)
    assert "--output-dir" in refuse(cache)
    assert "STORE" in refuse("--output-dir", tmp_path)


def test_an_output_directory_that_cannot_be_written(refuse: Refuse, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "--output-dir" in refuse(cache, "--output-dir", tmp_path / "file" / "out")


def test_a_width_change_needs_random_weights(distily_train: Run, cache: Path, tmp_path: Path) -> None:
    narrow = ["--student-model-config", '{"hidden_size": 32, "head_dim": 16}']
    code, _, err = distily_train(cache, "--output-dir", tmp_path, *narrow)
    assert code == 2
    assert "--init random" in err
    assert len(err.splitlines()) == 1
    random = [*narrow, "--init", "random", "--hidden-loss", "mse"]
    code, _, err = distily_train(cache, "--output-dir", tmp_path, *random)
    assert code == 2
    assert "32 wide and the teacher 64" in err


def test_teachers_that_are_not_the_caches(refuse: Refuse, cache: Path, teacher: Path, tmp_path: Path) -> None:
    other = teachers.llama(tmp_path / "other", vocab_size=99)
    assert "vocab_size is 99" in refuse(cache, "--output-dir", tmp_path, "--teacher", other)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((teacher / "config.json").read_bytes())
    line = refuse(cache, "--output-dir", tmp_path, "--teacher", bare)
    assert "no safetensors" in line
    assert "--init random" in line


def test_a_student_without_a_tokenizer_needs_the_vocabulary(
    refuse: Refuse, cache: Path, tmp_path: Path
) -> None:
    """With a tokenizer it is known what its tokens are; here there are the sizes alone to tell."""
    other = teachers.llama(tmp_path / "other", vocab_size=200)
    (other / "tokenizer.json").unlink()
    assert "200 tokens" in refuse(cache, "--output-dir", tmp_path, "--student", other)


def test_missing_column_groups_name_the_generate_flag(refuse: Refuse, teacher: Path, tmp_path: Path) -> None:
    from featurestore.format.schema import HiddenSpec

    samples = random_samples(8, 199)
    logits = write_cache(tmp_path / "logits", teacher, samples, [LogitsSpec(4)])
    line = refuse(logits, "--output-dir", tmp_path / "out", "--hidden-loss", "mse")
    assert "--hidden-layers" in line
    hidden = write_cache(tmp_path / "hidden", teacher, samples, [HiddenSpec(2, "bf16")])
    line = refuse(hidden, "--output-dir", tmp_path / "out")
    assert "distily-cache generate" in line
    assert "--top-k" in line


def test_a_damaged_cache_is_a_failure_not_a_bad_request(
    distily_train: Run, teacher: Path, tmp_path: Path
) -> None:
    store = write_cache(tmp_path / "store", teacher, random_samples(8, 199), [LogitsSpec(4)])
    victim = max(
        (path for path in store.glob("parts/**/c/*") if path.is_file()), key=lambda p: p.stat().st_size
    )
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    flags = ["--eval-fraction", 0.3, "--max_steps", 2, "--report_to", "none", "--disable_tqdm", "True"]
    code, _, err = distily_train(store, "--output-dir", tmp_path / "out", *flags)
    assert code == 1
    assert err.splitlines()[-1].startswith("distily-train: ")
    assert "Traceback" not in err


def test_an_environment_without_a_gpu_trains_in_bfloat16(tmp_path: Path) -> None:
    training = parse(["STORE", "--output-dir", str(tmp_path), "--bf16"]).training
    assert training.use_cpu is not torch.accelerator.is_available()


def test_user_errors_are_value_errors() -> None:
    assert issubclass(UserError, ValueError)


def test_the_short_help_shows_the_defaults_that_hold() -> None:
    by_name = {each.name: each.default for each in fields(DistillationConfig)}
    shown = 0
    for flag, said in _TRAINING.items():
        if found := re.search(r"\[default: (\S+)\]", said):
            default = by_name[flag.split()[0].removeprefix("--").replace("-", "_")]
            assert found[1] == str(getattr(default, "value", default)) or float(found[1]) == default, flag
            shown += 1
    assert shown >= 7


def test_quiet_prints_nothing_but_errors(cache: Path, tmp_path: Path) -> None:
    flags = ("--output-dir", tmp_path / "out", "--max-steps", 1, "--report-to", "none", "--quiet")
    done = call("distily-train", "from-cache", cache, *flags)
    assert (done.stdout, done.stderr) == ("", "") and (tmp_path / "out" / "report.html").is_file()
    refused = call("distily-train", "from-cache", cache, *flags, code=2)
    assert refused.stderr.startswith("distily-train: --output-dir") and refused.stderr.count("\n") == 1
    told = call("distily-train", "from-cache", cache, *flags, "--overwrite-output-dir", "--json")
    assert json.loads(told.stdout)["steps"] == 1 and told.stderr == ""


def test_no_bars_in_a_log(cache: Path, tmp_path: Path) -> None:
    flags = ("--output-dir", tmp_path / "out", "--max-steps", 2, "--report-to", "none")
    done = call("distily-train", "from-cache", cache, *flags)
    assert "%|" not in done.stderr and "it/s" not in done.stderr and "'loss'" in done.stdout
