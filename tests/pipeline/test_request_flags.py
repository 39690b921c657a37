"""The flags of `generate` and `plan`: declared once, with the defaults of the request they make."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer

from pipeline.cli import app
from pipeline.cli.request_flags import RequestFlags
from pipeline.engines.llm import _start
from pipeline.errors import RequestError
from pipeline.request.generate import GenerateRequest
from pipeline.request.teacher import engine_config
from pipeline.teacher.checkpoint import load_teacher
from tests.command import call
from tests.teachers import text_of


def options_of(command: str) -> dict[str, object]:
    group = typer.main.get_command(app)
    return {option.name: option.default for option in group.commands[command].params}  # type: ignore[attr-defined]


def test_defaults_are_those_of_the_request() -> None:
    words = ("./teacher", "./corpus.txt", "./store")
    assert RequestFlags(*words).request() == GenerateRequest(*words)


def test_generate_takes_what_plan_takes_and_little_more() -> None:
    generate, plan = options_of("generate"), options_of("plan")
    assert plan.items() <= generate.items()
    assert generate.keys() - plan.keys() == {
        "tensor_parallel_size",
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
        GenerateRequest("./teacher", "./corpus.txt", "./store", gpu_memory_utilization=share)


def test_a_share_of_memory_is_vllms() -> None:
    with pytest.raises(RequestError, match="--gpu-memory-utilization: only for --engine vllm"):
        GenerateRequest(
            "./teacher", "./corpus.txt", "./store", engine="transformers", gpu_memory_utilization=0.5
        )


@pytest.mark.parametrize("share", [None, 0.5])
def test_a_share_of_memory_is_handed_to_vllm(
    share: float | None, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm = pytest.importorskip("vllm")
    taken: dict[str, object] = {}
    monkeypatch.setattr(vllm, "LLM", taken.update)
    request = GenerateRequest(str(tiny_teacher), "./corpus.txt", "./store", gpu_memory_utilization=share)
    config = engine_config(request, load_teacher(str(tiny_teacher)), "float32")
    _start(config, False, enforce_eager=True, kv_cache_memory_bytes=1000, options={"runner": "pooling"})
    assert taken["runner"] == "pooling"
    # With the flag the choice is vLLM's own, within that share.
    expected = {"kv_cache_memory_bytes": 1000} if share is None else {"gpu_memory_utilization": share}
    assert {name: taken[name] for name in taken if "memory" in name} == expected
