"""The flags of `generate` and `plan`: declared once, with the defaults of the request they make."""

from __future__ import annotations

import typer

from pipeline.cli import app
from pipeline.cli.request_flags import RequestFlags
from pipeline.request import GenerateRequest


def options_of(command: str) -> dict[str, object]:
    group = typer.main.get_command(app)
    return {option.name: option.default for option in group.commands[command].params}  # type: ignore[attr-defined]


def test_defaults_are_those_of_the_request() -> None:
    words = ("./teacher", "./corpus.txt", "./store")
    assert RequestFlags(*words).request() == GenerateRequest(*words)


def test_generate_takes_what_plan_takes_and_little_more() -> None:
    generate, plan = options_of("generate"), options_of("plan")
    assert plan.items() <= generate.items()
    assert generate.keys() - plan.keys() == {"tensor_parallel_size", "max_num_batched_tokens", "verbose"}
