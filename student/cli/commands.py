"""The command line `distily-train`: parse, call one function, map errors to exit codes.

Exit codes: 0 done; 2 the request was wrong (one line on standard error says which flag and the fix); 1
failure; 130 and 143 stopped by SIGINT and by SIGTERM.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distily.logs import show_on_stderr
from distily.system.command_line import add_version, installed, quiet_libraries, reflow_help
from distily.system.stopping import stoppable
from distily.text import one_line, printable

if TYPE_CHECKING:
    from student.sweep.command import Sweep

app = typer.Typer(
    name="distily-train",
    help="Train a student from a cache of teacher features; the teacher itself is not needed any more.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

add_version(app, "distily-train")

_PASS_ALL = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


@app.command(
    "from-cache",
    context_settings=_PASS_ALL,
    add_help_option=False,
    help="Train a student on STORE into --output-dir. `from-cache --help-all` lists every flag.",
)
def from_cache(context: typer.Context) -> None:
    """Everything after the command's name goes to `student.config.parser`."""
    with _exit_codes():
        _run(context.args)


@app.command("plan", context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def plan_(
    context: typer.Context,
    gpu_memory: Annotated[
        float | None,
        typer.Option(metavar="GIB", help="Of one GPU to plan for. Default: this machine's GPU or memory."),
    ] = None,
    processes: Annotated[
        int | None, typer.Option(metavar="N", help="That train together, one on each GPU. Default: 1.")
    ] = None,
) -> None:
    """Tell what `from-cache STORE` with these flags would take: memory, steps, FLOPs, time.

    Trains nothing, and needs no GPU. Takes every flag of from-cache; --output-dir may be left out, --json
    prints JSON. With --fsdp the processes share the weights.
    """
    with _exit_codes():
        _plan(context.args, gpu_memory, processes)


@app.command("objectives")
def objectives(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the losses: formula, source, what the cache must hold, how exact they are, options."""
    from student.cli.objectives import rows, show

    if as_json:
        typer.echo(json.dumps(rows()))
    else:
        show()


@app.command("sweep")
def sweep_(
    stores: Annotated[
        list[str],
        typer.Argument(
            metavar="STORE...",
            help="Cache made by `distily-cache generate`; several teach together, see from-cache.",
        ),
    ],
    spec: Annotated[Path, typer.Argument(help="YAML file of what to vary: base, grid or search, seeds.")],
    out: Annotated[Path, typer.Option(help="Directory of the sweep; the same command resumes in it.")],
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

        done = sweep(SweepRequest(tuple(stores), spec, out, jobs))
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
        str | None, typer.Option(help="Blocks of --format gguf: TQ2_0 (default), TQ1_0, Q2_0 or Q4_0.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="New directory; DIR-FORMAT when left out.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Write a BitNet student in a format that others read, and compare it with the student."""
    from student.export.command import export
    from student.export.formats import ExportRequest
    from student.export.report import lines

    with _exit_codes(), _no_bars():
        report = export(
            ExportRequest(directory=directory, format=format, out=out, dtype=dtype, gguf_type=gguf_type)
        )
    typer.echo(json.dumps(report) if as_json else "\n".join(map(printable, lines(report))))


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
    typer.echo(json.dumps({"report": str(file)}) if as_json else printable(str(file)))


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
    push_to_hub: Annotated[
        str | None,
        typer.Option(metavar="REPO", help="Then upload student, tokenizer, card, plots there: me/name."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make REPO private, where it is new.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a README.md that was edited since.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write DIR/README.md, a model card in the hub's format, from the files in DIR."""
    from student.card import card
    from student.card.push import push_student

    with _exit_codes():
        file = card(directory, license, language or [], overwrite)
        url = push_student(directory, push_to_hub, private) if push_to_hub else None
    made = {"card": str(file)} | ({"url": url} if url else {})
    typer.echo(json.dumps(made) if as_json else printable(url or str(file)))


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
    """Let a student continue a prompt, with its speed and memory."""
    from student.export.generation import GenerationRequest, generate

    with _exit_codes(), _no_bars():
        result = generate(
            GenerationRequest(
                directory=directory,
                prompt=prompt,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                chat=chat,
                kernel=kernel,
                seed=seed,
            )
        )
    if as_json:
        typer.echo(json.dumps(result))
        return
    # What a model writes is data: --json has it to the letter.
    typer.echo(printable(result["text"], keep="\n\t"))
    typer.echo(
        f"{result['new_tokens']} tokens, {result['tokens_per_second']:.1f} tokens/s, weights "
        f"{result['weight_bytes'] / 1e6:.1f} MB in memory, peak {result['peak_memory_bytes'] / 1e6:.0f} MB",
        err=True,
    )


@app.command("eval")
def eval_(
    directory: Annotated[
        Path, typer.Argument(help="A student: the --output-dir of a training, or hf-bitnet.")
    ],
    cache: Annotated[
        str | None, typer.Option(help="Measure against this cache. Default: the one that summary.json names.")
    ] = None,
    manifest: Annotated[
        str | None, typer.Option(help="Of the cache. Default: the training's, with --cache the fullest.")
    ] = None,
    eval_fraction: Annotated[
        float | None, typer.Option(help="Share of the cache that is held out. Default: as in the training.")
    ] = None,
    all_samples: Annotated[
        bool, typer.Option("--all-samples", help="Every sample of the cache, not only held-out ones.")
    ] = False,
    trained_samples: Annotated[
        bool,
        typer.Option(
            "--trained-samples",
            help="Also the samples that the training learned from: how much better the student knows them "
            "than held-out ones.",
        ),
    ] = False,
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="A .txt, .jsonl, .csv or .parquet file, also .gz or .zst, a hub data set as NAME or "
            "NAME:CONFIG, or an entry of suites.yaml such as wikipedia-de. Can be repeated."
        ),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Of the hub data sets in --text; train.")] = None,
    text_column: Annotated[str | None, typer.Option(help="Of the rows in --text; text.")] = None,
    since: Annotated[
        str | None, typer.Option(help="Leave out rows of --text of an earlier day, e.g. 2024-06-30.")
    ] = None,
    date_column: Annotated[str, typer.Option(help="What --since looks at.")] = "date",
    max_seq_len: Annotated[
        int | None, typer.Option(help="Tokens of a window of --text; 1024, or what the models take.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks or groups of lm-evaluation-harness, and ours: squad,glue,...")
    ] = None,
    suite: Annotated[list[str] | None, typer.Option(help="seed (tasks) or wikipedia (texts).")] = None,
    task_data: Annotated[
        Path | None,
        typer.Option(help="Records of the tasks as files: DIR/<data set>/[<config>/]<split>.jsonl."),
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples in front of a record. Default: the task's.")
    ] = None,
    max_gen_toks: Annotated[
        int | None, typer.Option(help="Tokens that a task generates at most. Default: the task's.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Text file with a prompt on each line, which student and --teacher continue."),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Tokens that follow a prompt at most; 64.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put --prompts into the tokenizer's chat template.")
    ] = False,
    teacher: Annotated[
        str | None,
        typer.Option(help="Directory or hub name of a model to put beside, on texts, tasks and prompts."),
    ] = None,
    teacher_dtype: Annotated[str, typer.Option(help="auto: its own; float32, bfloat16, float16.")] = "auto",
    engine: Annotated[str, typer.Option(help="Of the tasks: transformers or vllm.")] = "transformers",
    batch_size: Annotated[int, typer.Option(help="Samples of the cache, and requests of a task.")] = 8,
    limit: Annotated[
        int | None, typer.Option(help="So many samples, windows of a text and records of a task at most.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print eval.json.")] = False,
) -> None:
    """Measure a student on cache, texts, tasks and prompts, its teacher beside it; writes DIR/eval.json."""
    with _exit_codes(), _quiet(as_json), _no_bars():
        from student.evaluation.command import evaluate
        from student.evaluation.request import (
            CacheOptions,
            EvalRequest,
            PromptOptions,
            TaskOptions,
            TextOptions,
        )

        record = evaluate(
            EvalRequest(
                directory=directory,
                cache=CacheOptions(cache, manifest, eval_fraction, all_samples, trained_samples),
                texts=TextOptions(
                    names=tuple(text or ()),
                    split=split,
                    column=text_column,
                    since=since,
                    date_column=date_column,
                    max_seq_len=max_seq_len,
                ),
                tasks=TaskOptions(
                    tuple(filter(None, (tasks or "").split(","))), task_data, num_fewshot, max_gen_toks
                ),
                prompts=PromptOptions(file=prompts, max_new_tokens=max_new_tokens, chat=chat),
                suites=tuple(suite or ()),
                teacher=teacher,
                teacher_dtype=teacher_dtype,
                engine=engine,
                batch_size=batch_size,
                limit=limit,
                command=("distily-train", *sys.argv[1:]),
            )
        )
    if as_json:
        typer.echo(json.dumps(record))
        return
    from distily.safety.console import SafeConsole
    from student.evaluation.show import show

    show(record, SafeConsole())


@contextlib.contextmanager
def _exit_codes() -> Iterator[None]:
    """Known errors become one line on stderr and an exit code; bugs keep their traceback."""
    from distily.errors import DistilyError
    from student.errors import exit_code

    try:
        yield
    except DistilyError as error:
        typer.echo(f"distily-train: {one_line(error, None)}", err=True)
        raise typer.Exit(exit_code(error)) from error


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Of loading and writing a model, which takes seconds."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
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
    from student.config.help import check_names, show_help, wants_help

    if wants_help(argv):
        show_help()
        return
    if "--help-all" in argv:
        argv = ["--help"]
    check_names(argv)
    from student.config.parser import parse
    from student.config.recipes import requests, take_recipe
    from student.training.run import train_from_cache
    from student.training.stages import train_stages

    recipe, argv = take_recipe(argv)
    asked = parse(argv) if recipe is None else requests(recipe, argv)
    first = asked[-1].request if isinstance(asked, list) else asked
    as_json = first.as_json
    with _silent() if first.quiet else _quiet(as_json):
        summary = train_stages(asked) if isinstance(asked, list) else train_from_cache(asked)
    # Of several processes, the first one's.
    if summary and (as_json or not first.quiet):
        typer.echo(json.dumps(summary) if as_json else printable(summary["report"]))


def _plan(argv: list[str], gpu_memory: float | None, processes: int | None) -> None:
    from student.config.help import check_names

    check_names(argv)
    from student.planning.command import plan_command
    from student.planning.show import show

    as_json = "--json" in argv
    with _quiet(as_json):
        plans = plan_command(argv, gpu_memory, processes)
    if as_json:
        made = {name: plan.to_json() for name, plan in plans.items()}
        typer.echo(json.dumps(made.get("", {"stages": made})))
        return
    from distily.safety.console import SafeConsole

    for name, plan in plans.items():
        if name:
            typer.echo(f"stage {name}")
        show(plan, SafeConsole())


def _quiet(as_json: bool) -> contextlib.AbstractContextManager[object]:
    """Libraries write their logs to standard output; with --json that belongs to the result alone."""
    return contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Nothing is printed by us or by libraries; what is raised passes."""
    with (
        Path(os.devnull).open("w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


reflow_help(app)


def main() -> None:
    """Console script `distily-train`."""
    quiet_libraries()
    show_on_stderr("distily-train")
    with stoppable("distily-train"), installed("distily-train", "[train]"):
        app()
