"""The flags of `generate` and `plan`: made of the fields of the request, with its defaults and its limits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, field, fields, make_dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

from pipeline.cli import app, request_flags
from pipeline.cli.request_flags import request_of, takes_request
from pipeline.engines.llm import _start
from pipeline.errors import RequestError
from pipeline.request.flags import flag, flags_of
from pipeline.request.generate import GenerateRequest
from pipeline.request.teacher import engine_config
from pipeline.request.writing import WritingRequest
from pipeline.teacher.checkpoint import load_teacher
from tests.command import call
from tests.teachers import text_of

WORDS = {"teacher": "./teacher", "dataset": "./corpus.txt", "out": "./store"}


def options_of(command: str) -> dict[str, Any]:
    group = typer.main.get_command(app)
    return {option.name: option.default for option in group.commands[command].params}  # type: ignore[attr-defined]


def test_defaults_are_those_of_the_request() -> None:
    for command in ("generate", "plan"):
        assert request_of(options_of(command) | WORDS) == GenerateRequest(**WORDS)
    writing = {"continuations": 2}
    asked = request_of(options_of("generate") | WORDS | writing)
    assert asked == GenerateRequest(**WORDS, writing=WritingRequest(**writing))


def test_every_field_is_a_flag_and_every_flag_a_field() -> None:
    of_request = {field.name for field in fields(GenerateRequest)} - {"writing"}
    of_writing = {field.name for field in fields(WritingRequest)}
    assert flags_of(GenerateRequest).keys() == of_request and flags_of(WritingRequest).keys() == of_writing
    assert options_of("generate").keys() == of_request | of_writing | {"verbose", "quiet", "as_json"}


def test_a_new_field_is_all_that_a_new_flag_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    about = flag("Most documents.", "Data", metavar="N", least=2)
    more = ("most_rows", int | None, field(default=None, metadata=about))
    extended = make_dataclass("Extended", [more], bases=(GenerateRequest,), frozen=True, kw_only=True)
    monkeypatch.setattr(request_flags, "GenerateRequest", extended)
    seen: list[Any] = []

    @takes_request()
    def command(flags: Mapping[str, Any]) -> None:
        seen.append(request_of(flags).most_rows)  # type: ignore[attr-defined]

    program = typer.Typer()
    program.command()(command)
    run = typer.main.get_command(program)
    (option,) = (option for option in run.params if option.name == "most_rows")
    assert (option.help, option.rich_help_panel, option.metavar) == ("Most documents.", "Data", "N")  # type: ignore[attr-defined]
    for rest in ((), ("--most-rows", "2")):
        run(["./teacher", "./corpus.txt", "--out", "./store", *rest], standalone_mode=False)
    assert seen == [None, 2]
    with pytest.raises(RequestError, match="--most-rows 1: must be at least 2"):
        run(["./teacher", "./corpus.txt", "--out", "./store", "--most-rows", "1"], standalone_mode=False)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"long": "cut"}, "--long cut: choose one of split, drop"),
        ({"loss_on": ""}, "--loss-on : choose one of assistant, all"),
        ({"min_seq_len": 1}, "--min-seq-len 1: must be at least 2"),
        ({"hidden_layers": "1,x"}, "--hidden-layers 1,x: give numbers with commas between, e.g. 10,20"),
        ({"temperatures": "x"}, "--temperatures x: give numbers with commas between, e.g. 2,4"),
        ({"continuations": 0}, "--continuations 0: must be at least 1"),
        ({"from_student": "./s"}, "--from-student: has no effect without --continuations; add"),
        # Given, though it is the default.
        ({"continuation_top_p": 1.0}, "--continuation-top-p: has no effect without --continuations; add"),
    ],
)
def test_what_a_flag_does_not_take_is_refused_by_its_name(flags: dict[str, Any], line: str) -> None:
    with pytest.raises(RequestError) as refused:
        request_of(options_of("generate") | WORDS | flags)
    assert str(refused.value).startswith(line)


def test_numbers_with_commas() -> None:
    flags = {"hidden_layers": "3, 1", "relation_layers": "0,", "temperatures": "2,0.5"}
    asked = request_of(options_of("generate") | WORDS | flags)
    assert (asked.hidden_layers, asked.relation_layers, asked.temperatures) == ((3, 1), (0,), (2.0, 0.5))


def test_help_shows_the_defaults_of_the_request() -> None:
    """Those that the command line cannot show by itself, since it tells "not given" from the default."""
    for name, default in ((one.name, one.default) for one in fields(WritingRequest)):
        if default not in (MISSING, None):
            assert f"(default: {default:g})" in flags_of(WritingRequest)[name].help


def test_generate_takes_what_plan_takes_and_little_more() -> None:
    generate, plan = options_of("generate"), options_of("plan")
    assert plan.items() <= generate.items()
    assert generate.keys() - plan.keys() == {
        "tensor_parallel_size",
        "data_parallel",
        "ray",
        "workers",
        "gpus_per_worker",
        "max_num_batched_tokens",
        "gpu_memory_utilization",
        "verbose",
    }


def test_flags_stand_under_headings_and_what_every_run_needs_stands_first() -> None:
    group = typer.main.get_command(app)
    for command in ("generate", "plan"):
        flags = [flag for flag in group.commands[command].params if flag.param_type_name == "option"]  # type: ignore[attr-defined]
        first = {flag.name for flag in flags if flag.rich_help_panel is None}
        assert first <= {"out", "verbose", "quiet", "as_json"} and "out" in first
        assert len({flag.rich_help_panel for flag in flags}) == 6


def test_quiet_prints_nothing_but_what_was_left_out(tiny_teacher: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join(json.dumps({"text": text_of(20, n)}) for n in range(8)))
    flags = ("--out", tmp_path / "store", "--engine", "transformers", "--max-seq-len", 32, "--quiet")
    done = call("distily-cache", "generate", tiny_teacher, texts, *flags)
    assert (done.stdout, done.stderr) == ("", "")
    texts.write_text("\n".join(json.dumps({"text": text}) for text in ("w1 w2 w3", "")))
    told = call("distily-cache", "generate", tiny_teacher, texts, *flags)
    assert (told.stdout, told.stderr) == ("", "left out: 1 empty\n")
    refused = call("distily-cache", "generate", tiny_teacher, texts, *flags, "--top-p", 95, code=2)
    assert "--top-p" in refused.stderr


@pytest.mark.parametrize("share", [0.0, -0.5, 1.01, float("nan")])
def test_a_share_of_memory_is_in_zero_to_one(share: float) -> None:
    with pytest.raises(RequestError, match=r"--gpu-memory-utilization .*\(0, 1\]"):
        GenerateRequest(**WORDS, gpu_memory_utilization=share)


def test_a_share_of_memory_is_vllms() -> None:
    with pytest.raises(RequestError, match="--gpu-memory-utilization: only for --engine vllm"):
        GenerateRequest(**WORDS, engine="transformers", gpu_memory_utilization=0.5)


@pytest.mark.parametrize("share", [None, 0.5])
def test_a_share_of_memory_is_handed_to_vllm(
    share: float | None, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm = pytest.importorskip("vllm")
    taken: dict[str, object] = {}
    monkeypatch.setattr(vllm, "LLM", taken.update)
    request = GenerateRequest(**WORDS, gpu_memory_utilization=share)
    config = engine_config(request, load_teacher(str(tiny_teacher)), "float32")
    _start(config, False, enforce_eager=True, kv_cache_memory_bytes=1000, options={"runner": "pooling"})
    assert taken["runner"] == "pooling"
    # With the flag the choice is vLLM's own, within that share.
    expected = {"kv_cache_memory_bytes": 1000} if share is None else {"gpu_memory_utilization": share}
    assert {name: taken[name] for name in taken if "memory" in name} == expected
