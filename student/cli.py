"""The command line `distily-train`: parse, call one function, map errors to exit codes.

Exit codes: 0 done; 2 the request was wrong (one line on standard error says which flag and the mend); 1
failure.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from student.sweep.command import Sweep

app = typer.Typer(
    name="distily-train",
    help="Train a student from a cache of teacher features; the teacher itself is not needed any more.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_PASS_ALL = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


@app.command(
    "from-cache",
    context_settings=_PASS_ALL,
    add_help_option=False,
    help="Train a student on STORE into --output-dir. `from-cache --help` lists every flag.",
)
def from_cache(context: typer.Context) -> None:
    """Everything after the command's name goes to `student.arguments`."""
    with _exit_codes():
        _run(context.args)


@app.command("objectives")
def objectives(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the losses: formula, source, what the cache must hold, how exact they are, options."""
    from student.objective.table import rows, show

    if as_json:
        typer.echo(json.dumps(rows()))
    else:
        show()


@app.command("sweep")
def sweep_(
    store: Annotated[str, typer.Argument(help="Cache made by `distily-cache generate`.")],
    spec: Annotated[Path, typer.Argument(help="YAML file of what to vary: base, grid or search, seeds.")],
    out: Annotated[Path, typer.Option(help="Directory of the sweep; the same command goes on in it.")],
    jobs: Annotated[
        int | None, typer.Option(help="Runs at once. Default: as many as cores and memory allow.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print sweep.json instead of the table.")] = False,
) -> None:
    """Train many students on one cache, each in a process of its own, and compare them.

    Finished runs are not run again. Exit code 1 when a run has failed.
    """
    with _exit_codes():
        from student.sweep.command import SweepRequest, sweep

        done = sweep(SweepRequest(store, spec, out, jobs))
    _show_sweep(done, as_json)


@app.command("export")
def export_(
    directory: Annotated[Path, typer.Argument(help="A BitNet student: the --output-dir of a training.")],
    format: Annotated[str, typer.Option(help="hf-bitnet, gguf, compressed-tensors or bitblas.")],
    dtype: Annotated[
        str | None,
        typer.Option(help="Type of embeddings, head, norms and biases: bfloat16, float16 or float32."),
    ] = None,
    gguf_type: Annotated[
        str | None, typer.Option(help="Blocks of --format gguf: TQ2_0 (default), TQ1_0 or Q2_0.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="New directory; DIR-FORMAT when left out.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Write a BitNet student in a format that others read, and compare it with the student."""
    from student.export.command import export
    from student.export.formats import ExportRequest
    from student.export.report import lines

    with _exit_codes(), _no_bars():
        report = export(ExportRequest(directory, format, out, dtype, gguf_type))
    typer.echo(json.dumps(report) if as_json else "\n".join(lines(report)))


@app.command("report")
def report_(
    directories: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="--output-dir of trainings, or of a sweep.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE.html", help="Default: DIR/report.html, of several ./report.html."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write one self-contained HTML page about one or several trainings, from the files in DIR."""
    from student.report.command import report

    with _exit_codes():
        file = report(directories, out)
    typer.echo(json.dumps({"report": str(file)}) if as_json else str(file))


@app.command("card")
def card_(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="--output-dir of a training.")],
    license: Annotated[
        str | None,
        typer.Option(help="Of the student, as the hub spells it: apache-2.0, mit, llama3.2, other."),
    ] = None,
    language: Annotated[
        list[str] | None, typer.Option(help="Of the student's text: en, de; may be given several times.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write DIR/README.md, a model card in the hub's format, from the files in DIR."""
    from student.card import card

    with _exit_codes():
        file = card(directory, license, language or [])
    typer.echo(json.dumps({"card": str(file)}) if as_json else str(file))


@app.command("generate")
def generate_(
    directory: Annotated[Path, typer.Argument(help="A student: --output-dir of a training, or hf-bitnet.")],
    prompt: Annotated[str, typer.Option(help="What the student reads.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.")] = 64,
    temperature: Annotated[
        float, typer.Option(help="0 takes the best token; above, tokens are drawn.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    chat: Annotated[
        bool, typer.Option("--chat/--no-chat", help="Use the tokenizer's chat template, where it has one.")
    ] = True,
    kernel: Annotated[str, typer.Option(help="torch, or bitblas on an NVIDIA GPU.")] = "torch",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Let a student go on with a prompt, with its speed and memory."""
    from student.generation import GenerateRequest, generate

    with _exit_codes(), _no_bars():
        result = generate(GenerateRequest(directory, prompt, max_new_tokens, temperature, chat, kernel, seed))
    if as_json:
        typer.echo(json.dumps(result))
        return
    typer.echo(result["text"])
    typer.echo(
        f"{result['new_tokens']} tokens, {result['tokens_per_second']:.1f} tokens/s, weights "
        f"{result['weight_bytes'] / 1e6:.1f} MB in memory, peak {result['peak_memory_bytes'] / 1e6:.0f} MB",
        err=True,
    )


@contextlib.contextmanager
def _exit_codes() -> Iterator[None]:
    """Known errors become one line on stderr and an exit code; bugs keep their traceback."""
    from featurestore.errors import BAD_REQUESTS, FeatureStoreError
    from student.errors import StudentError, UserError

    try:
        yield
    except (UserError, *BAD_REQUESTS) as error:
        _fail(error, 2)
    except (StudentError, FeatureStoreError) as error:
        _fail(error, 1)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Of loading and writing a model, which takes seconds."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def _show_sweep(done: Sweep, as_json: bool) -> None:
    """The table and where the page is; exit code 1 when a run has failed."""
    if as_json:
        typer.echo(json.dumps(done.report()))
    else:
        done.show()
    if any(row.state == "failed" for row in done.rows()):
        raise typer.Exit(1)


def _run(argv: list[str]) -> None:
    from student.arguments import parse
    from student.recipe import requests, take_recipe
    from student.run import train_from_cache
    from student.stages import train_stages

    recipe, argv = take_recipe(argv)
    asked = parse(argv) if recipe is None else requests(recipe, argv)
    as_json = (asked[-1].request if isinstance(asked, list) else asked).options.json
    # Trainer writes its log to standard output; with --json that belongs to the summary alone.
    quiet = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
    with quiet:
        summary = train_stages(asked) if isinstance(asked, list) else train_from_cache(asked)
    if summary:  # of several processes, the first one's
        typer.echo(json.dumps(summary) if as_json else summary["report"])


def _fail(error: Exception, code: int) -> None:
    typer.echo(f"distily-train: {' '.join(str(error).split())}", err=True)
    raise typer.Exit(code) from error


def main() -> None:
    """Console script `distily-train`."""
    app()


if __name__ == "__main__":
    main()
