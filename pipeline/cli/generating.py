"""Commands that run a teacher, or say what that would take: generate and plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any

import typer

from distily.system.command_line import quiet_libraries
from pipeline.cli.exits import exit_codes
from pipeline.cli.options import JsonOption, QuietOption
from pipeline.cli.output import console, print_json, say
from pipeline.cli.request_flags import request_of, takes_request


@takes_request()
def generate(
    flags: Mapping[str, Any],
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the engine's own log.")] = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run TEACHER over DATASET and store its features; computes only what STORE lacks.

    Killed or interrupted at any moment, the same command resumes where it stopped. A request that the store
    covers already computes nothing. Each position keeps the head of the teacher's distribution, logsumexp,
    the log-probability of the actual next token, the entropy, and the temperatures and hidden layers
    asked for. With --continuations the samples are texts that the teacher, or a student, writes first.

    Example: distily-cache generate ./teacher corpus.txt --out ./cache --hidden-layers 15
    """
    with exit_codes(verbose):
        request = request_of(flags)
        # Only now: a request that is refused need not wait until this is loaded.
        from pipeline.generate.run import execute, prepare

        with _reporter(quiet) as report:
            prepared = prepare(request, report)
            outcome = execute(prepared, report, verbose)
        _print_outcome(request.out, outcome, as_json, quiet)


@takes_request(
    without=(
        "tensor_parallel_size",
        "data_parallel",
        "ray",
        "workers",
        "gpus_per_worker",
        "max_num_batched_tokens",
        "gpu_memory_utilization",
    )
)
def plan(
    flags: Mapping[str, Any],
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show what the same `generate` would compute, in about how many bytes and how much time.

    Starts and writes nothing. The time is that of earlier runs of the store, else a rough one.
    """
    with exit_codes():
        request = request_of(flags)
        from pipeline.generate.estimate import estimate
        from pipeline.generate.run import prepare
        from pipeline.report.tables import render_plan

        with _reporter(quiet) as report:
            prepared = prepare(request, report)
        forecast = estimate(prepared)
        if as_json:
            print_json(forecast.to_json())
        else:
            render_plan(console(), forecast)


def _reporter(quiet: bool) -> Any:
    from pipeline.progress import ConsoleReporter

    quiet_libraries(quiet)
    return ConsoleReporter(console(stderr=True, quiet=quiet))


def _print_outcome(out: str, outcome: Any, as_json: bool, quiet: bool) -> None:
    if as_json:
        print_json({"store": out, **asdict(outcome)})
        return
    if str(outcome.left_out):
        say(f"left out: {outcome.left_out}")
    if quiet:
        return
    if outcome.writing:
        say(_written_line(outcome.writing))
    if not outcome.tokens:
        weights = f"{outcome.sidecar_size:,} bytes of the teacher's weights added; " * bool(
            outcome.sidecar_size
        )
        say(f"{weights}nothing to generate: {out} already holds all {outcome.samples:,} samples")
        return
    rate = outcome.tokens / max(outcome.capture_seconds, 1e-9)
    say(
        f"{out}: {outcome.tokens:,} tokens captured in {outcome.capture_seconds:,.1f} s ({rate:,.0f} tok/s, "
        f"engine start {outcome.engine_seconds:,.1f} s), {outcome.size / outcome.tokens:,.1f} bytes/token"
    )


def _written_line(written: Any) -> str:
    rate = written.tokens / max(written.seconds, 1e-9)
    return (
        f"{written.new:,} of {written.texts:,} texts written by {written.by}: {written.tokens:,} tokens in "
        f"{written.seconds:,.1f} s ({rate:,.0f} tok/s)"
        if written.new
        else f"all {written.texts:,} texts of {written.by} were written before"
    )
