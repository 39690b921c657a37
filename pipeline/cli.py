"""`distily-cache`: parse, call one function, map errors to exit codes (0 done, 2 bad request, 1 failure)."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from featurestore.errors import (
    FeatureStoreError,
    MissingFeatureError,
    SpecMismatchError,
    StoreAccessError,
    StoreFormatError,
    StoreNotFoundError,
)
from pipeline.errors import PipelineError, RequestError

app = typer.Typer(
    name="distily-cache",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Run a teacher once over a data set and keep what a student learns from: "
    "per token the top of its distribution and chosen hidden states, in a feature store.",
)
_USER_ERRORS = (
    RequestError,
    SpecMismatchError,
    StoreNotFoundError,
    StoreFormatError,
    StoreAccessError,
    MissingFeatureError,
)

StoreArgument = Annotated[
    str, typer.Argument(metavar="STORE", help="Feature store: a directory, s3://bucket/prefix or gs://...")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")]
TeacherArgument = Annotated[
    str, typer.Argument(metavar="TEACHER", help="Local checkpoint directory or hub name of a causal LM.")
]
DatasetArgument = Annotated[
    str,
    typer.Argument(
        metavar="DATASET",
        help="Local .txt/.jsonl/.parquet/.arrow file or folder, a saved `datasets` directory, or a hub name.",
    ),
]
OutOption = Annotated[
    str,
    typer.Option(
        "--out", help="Feature store to create or to extend: a directory, s3://bucket/prefix or gs://..."
    ),
]
SplitOption = Annotated[str, typer.Option(help="Split of a hub or saved data set.")]
ConfigOption = Annotated[str | None, typer.Option(help="Configuration of a hub data set, e.g. 20231101.en.")]
ColumnOption = Annotated[str, typer.Option(help="Column that holds the text.")]
SamplesOption = Annotated[
    int | None, typer.Option(help="Capture the first N samples only (after cutting or packing).")
]
LengthOption = Annotated[
    int | None, typer.Option(help="Longest sample in tokens. [default: 2048, or the model's limit if lower]")
]
PackOption = Annotated[
    bool,
    typer.Option(
        "--pack/--no-pack",
        help="Join documents with the end-of-sequence token into full samples, "
        "instead of cutting each document on its own.",
    ),
]
TopKOption = Annotated[
    int | None,
    typer.Option(
        help="Head size: exact logits kept per position, or their cap with --top-p. 0: none. "
        "[default: 64; but without --top-k, --top-p and --tail: --top-k 12 --top-p 0.7 --tail 16]"
    ),
]
TopPOption = Annotated[
    float | None, typer.Option(help="End the head where its cumulative probability reaches P; at most K.")
]
TailOption = Annotated[
    int | None,
    typer.Option(
        help="How often to draw from outside the head: with some draws the student's gradient is unbiased. "
        "[default: see --top-k]"
    ),
]
TemperaturesOption = Annotated[
    str,
    typer.Option(
        help="Temperatures, e.g. 2,4: keeps logsumexp(logits / T) of each position, so that the head's "
        "probabilities at T are known. T=1 is always kept."
    ),
]
LayersOption = Annotated[
    str,
    typer.Option(
        help="Hidden states to keep, e.g. 10,20: 0 is the embeddings, i the residual stream after block i, "
        "numbered as transformers' output_hidden_states."
    ),
]
HiddenDtypeOption = Annotated[
    str,
    typer.Option(help="Stored type of hidden states: bf16, f32, or int8 / fp8 with a scale per position."),
]
FinalOption = Annotated[
    bool,
    typer.Option(
        "--final",
        help="Keep the state that enters the LM head, and once the head itself: together they give the whole "
        "distribution.",
    ),
]
RelationOption = Annotated[
    str,
    typer.Option(
        help="Decoder blocks, from 0, e.g. 10,20: keep the state that enters block i (hidden.L<i>), and once "
        "what makes queries, keys and values of it."
    ),
]
EngineOption = Annotated[
    str, typer.Option(help="vllm: fast, in-worker capture. transformers: slower, runs any causal LM.")
]
DtypeOption = Annotated[
    str, typer.Option(help="Teacher's compute type: auto (as saved), bfloat16, float16 or float32.")
]
ParallelOption = Annotated[int, typer.Option(help="GPUs that share one teacher (vLLM).")]
BatchOption = Annotated[
    int,
    typer.Option(help="Positions of one vLLM step; smaller needs less memory, longer samples are chunked."),
]
ShardOption = Annotated[
    int, typer.Option(help="Positions per shard, the unit of commit: what a kill can cost at most.")
]
SeedOption = Annotated[int, typer.Option(help="Seed of the tail's draws and of the engine.")]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Allow the teacher's own Python code to run.")
]


@app.command()
def generate(
    teacher: TeacherArgument,
    dataset: DatasetArgument,
    out: OutOption,
    split: SplitOption = "train",
    dataset_config: ConfigOption = None,
    text_column: ColumnOption = "text",
    num_samples: SamplesOption = None,
    max_seq_len: LengthOption = None,
    pack: PackOption = False,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    tail: TailOption = None,
    temperatures: TemperaturesOption = "",
    hidden_layers: LayersOption = "",
    hidden_dtype: HiddenDtypeOption = "bf16",
    final: FinalOption = False,
    relation_layers: RelationOption = "",
    engine: EngineOption = "vllm",
    dtype: DtypeOption = "auto",
    tensor_parallel_size: ParallelOption = 1,
    max_num_batched_tokens: BatchOption = 4096,
    shard_tokens: ShardOption = 32_768,
    seed: SeedOption = 0,
    trust_remote_code: TrustOption = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the engine's own log.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Run TEACHER over DATASET and store its features; computes only what STORE lacks.

    Killed or interrupted at any moment, the same command goes on where it stopped. A request that the store
    covers already computes nothing. Each position keeps the head of the teacher's distribution, logsumexp,
    the log-probability of the actual next token, the entropy, and the temperatures and hidden layers
    asked for.

    Example: distily-cache generate ./teacher corpus.txt --out ./cache --hidden-layers 15
    """
    from pipeline.generate import execute, prepare

    with _exit_codes():
        request = _request(locals())
        with _reporter() as report:
            prepared = prepare(request, report)
            outcome = execute(prepared, report, verbose)
        _print_outcome(request.out, outcome, as_json)


@app.command()
def plan(
    teacher: TeacherArgument,
    dataset: DatasetArgument,
    out: OutOption,
    split: SplitOption = "train",
    dataset_config: ConfigOption = None,
    text_column: ColumnOption = "text",
    num_samples: SamplesOption = None,
    max_seq_len: LengthOption = None,
    pack: PackOption = False,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    tail: TailOption = None,
    temperatures: TemperaturesOption = "",
    hidden_layers: LayersOption = "",
    hidden_dtype: HiddenDtypeOption = "bf16",
    final: FinalOption = False,
    relation_layers: RelationOption = "",
    engine: EngineOption = "vllm",
    dtype: DtypeOption = "auto",
    shard_tokens: ShardOption = 32_768,
    seed: SeedOption = 0,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show what the same `generate` would compute, in about how many bytes and how much time.

    Starts and writes nothing. The time is that of earlier runs of the store, else a rough one.
    """
    from pipeline.estimate import estimate
    from pipeline.generate import prepare
    from pipeline.render import render_plan

    with _exit_codes():
        with _reporter() as report:
            prepared = prepare(_request(locals()), report)
        forecast = estimate(prepared)
        if as_json:
            _print_json(forecast.to_json())
        else:
            render_plan(Console(), forecast)


@app.command()
def info(
    store: StoreArgument,
    sample: Annotated[
        int | None, typer.Option(help="Show sample N (from 0) instead, token by token.", metavar="N")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="With --sample: so many tokens at most.")] = 40,
    as_json: JsonOption = False,
) -> None:
    """Show what is in STORE: teacher, samples, column groups, where bytes and mass are, what it cost.

    With --sample N: each token's text, the teacher's probability of the token that follows, what it held for
    more probable, the mass in the stored head, and the entropy.
    """
    from featurestore.info import store_info
    from pipeline.inside import render_ranks, render_sizes
    from pipeline.render import render_info

    with _exit_codes():
        if sample is not None:
            _show_sample(store, sample, tokens, as_json)
            return
        found = store_info(store)
        ranks = _mass_by_rank(store) if found.manifest else None
        if as_json:
            _print_json({**found.to_json(), "mass_by_rank": None if ranks is None else ranks.to_json()})
            return
        console = Console()
        render_info(console, found)
        render_sizes(console, found)
        if ranks is not None:
            render_ranks(console, ranks)


@app.command()
def verify(
    store: StoreArgument,
    deep: Annotated[bool, typer.Option("--deep", help="Read every byte and decode every row.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Check that STORE holds what was committed; exit code 1 if it does not.

    Without --deep the records, the files and their sizes are checked.
    """
    from featurestore.verify import verify_store
    from pipeline.render import render_report

    with _exit_codes():
        report = verify_store(store, deep=deep)
        if as_json:
            _print_json(report.to_json())
        else:
            render_report(Console(), report)
        if report.problems:
            raise typer.Exit(1)


@app.command(name="ls")
def list_command(store: StoreArgument, as_json: JsonOption = False) -> None:
    """List the shards of STORE: samples, tokens, column groups, bytes."""
    from featurestore.listing import list_shards
    from pipeline.render import render_shards

    with _exit_codes():
        shards = list_shards(store)
        if as_json:
            _print_json([shard.to_json() for shard in shards])
        else:
            render_shards(Console(), shards)


@app.command()
def gc(
    store: StoreArgument,
    delete: Annotated[
        bool, typer.Option("--delete", help="Remove it; without this it is only listed.")
    ] = False,
    min_age: Annotated[
        float, typer.Option(min=0, help="Spare what somebody touched in the last so many seconds.")
    ] = 3600.0,
    as_json: JsonOption = False,
) -> None:
    """Find what killed and overtaken runs left behind in STORE, and with --delete remove it.

    Nothing that was committed is touched. What is younger than --min-age may belong to a run that is at work.
    """
    from featurestore.gc import collect
    from pipeline.render import render_collection

    with _exit_codes():
        found = collect(store, delete, min_age)
        if as_json:
            _print_json(found.to_json())
        else:
            render_collection(Console(), found)


@app.command()
def merge(
    store: StoreArgument,
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE...", help="Stores to bring in.")],
    as_json: JsonOption = False,
) -> None:
    """Copy what SOURCE... hold into STORE, which is made if it is not there; nothing is computed.

    All must be of one teacher and engine. Every byte is checked against its committed hash; what STORE has
    stays as it is. Killed at any moment, the same command completes it.

    Example: distily-cache merge ./all ./machine-1 ./machine-2
    """
    from featurestore.merge import merge_stores
    from pipeline.progress import bytes_progress

    with _exit_codes():
        with bytes_progress(Console(stderr=True), "merge") as advance:
            merged = merge_stores(store, sources, advance)
        if as_json:
            _print_json({"store": str(store), **merged.to_json()})
        else:
            _say(
                f"{store}: {merged.tasks:,} shards, {merged.bytes:,} bytes copied; manifest {merged.manifest}"
            )


@app.command()
def export(
    store: StoreArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New directory to write to.")],
    format_name: Annotated[
        str,
        typer.Option(
            "--format", help="parquet: sharded files as on the hub. datasets: load_from_disk opens it."
        ),
    ] = "parquet",
    groups: Annotated[
        str, typer.Option(help="Column groups, e.g. logits,hidden.L2. [default: all that every sample has]")
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """Write the samples of STORE with their features as one row each, for other tools to read.

    Example: distily-cache export ./cache ./rows --groups logits
    """
    from pipeline.export import export_store
    from pipeline.progress import tokens_progress

    with _exit_codes():
        kinds = [kind.strip() for kind in groups.split(",") if kind.strip()] or None
        with tokens_progress(Console(stderr=True), "export") as advance:
            exported = export_store(store, out, format_name, kinds, advance)
        if as_json:
            _print_json({"out": str(out), **exported.to_json()})
        else:
            _say(f"{out}: {exported.samples:,} samples, {exported.tokens:,} tokens, {exported.bytes:,} bytes")


@app.command(name="import")
def import_command(
    dataset: DatasetArgument,
    out: OutOption,
    teacher: Annotated[
        str,
        typer.Option(help="Checkpoint directory or hub name of the teacher; config and tokenizer suffice."),
    ],
    layout: Annotated[str, typer.Option(help="How the data set is laid out: distillkit or axolotl.")],
    split: SplitOption = "train",
    dataset_config: ConfigOption = None,
    compression: Annotated[
        Path | None,
        typer.Option(
            help="DistillKit's compression configuration. [default: compression_config.yaml beside it]"
        ),
    ] = None,
    targets: Annotated[
        str | None,
        typer.Option(
            help="Token that row t describes: next, or own (axolotl before June 2025). "
            "[default: next, and refused where that does not fit]"
        ),
    ] = None,
    shard_tokens: ShardOption = 32_768,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Bring a published data set of top-k log-probabilities, DATASET, into a store; no model runs.

    Such a store knows the heads alone: no entropy, no hidden states, and the label's log-probability only
    where the label is in the head.

    Example: distily-cache import ./captured --out ./cache --teacher ./teacher --layout distillkit
    """
    from pipeline.importing import ImportRequest, import_dataset
    from pipeline.progress import tokens_progress

    with _exit_codes():
        request = ImportRequest(
            dataset=dataset,
            out=out,
            teacher=teacher,
            layout=layout,
            split=split,
            dataset_config=dataset_config,
            compression=compression,
            targets=targets,
            shard_tokens=shard_tokens,
            trust_remote_code=trust_remote_code,
        )
        with tokens_progress(Console(stderr=True), "import") as advance:
            outcome = import_dataset(request, advance)
        if as_json:
            _print_json({"store": str(out), **asdict(outcome)})
        else:
            _say(
                f"{out}: {outcome.samples:,} samples, {outcome.written:,} tokens written, "
                f"{outcome.unknown:,} positions without a distribution, "
                f"{outcome.renormalised:,} brought down to a mass of one"
            )


def main() -> None:
    app()


def _request(arguments: dict[str, Any]) -> Any:
    """The command's parameters as a validated request."""
    from dataclasses import fields

    from pipeline.request import GenerateRequest

    names = {field.name for field in fields(GenerateRequest)}
    values = {name: value for name, value in arguments.items() if name in names}
    lists = {
        "hidden_layers": _numbers(int, arguments["hidden_layers"], "--hidden-layers", "10,20"),
        "relation_layers": _numbers(int, arguments["relation_layers"], "--relation-layers", "10,20"),
        "temperatures": _numbers(float, arguments["temperatures"], "--temperatures", "2,4"),
    }
    return GenerateRequest(**(values | lists))


def _numbers(kind: type[int | float], text: str, flag: str, example: str) -> tuple[int | float, ...]:
    try:
        return tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise RequestError(f"{flag} {text}: give numbers with commas between, e.g. {example}") from None


def _show_sample(store: str, index: int, tokens: int, as_json: bool) -> None:
    from featurestore.inspect import look_at
    from featurestore.reader import CacheReader
    from pipeline.inside import render_sample, sample_json
    from pipeline.pieces import load_pieces

    reader = CacheReader.open(store)
    if not 0 <= index < len(reader):
        raise RequestError(f"--sample {index}: {store} has {len(reader)} samples, 0 to {len(reader) - 1}")
    view, pieces = look_at(reader, index, tokens), load_pieces(reader.teacher_dir)
    if as_json:
        _print_json(sample_json(view, pieces))
    else:
        render_sample(Console(), view, pieces)


def _mass_by_rank(store: str) -> Any:
    """None where there are no logits; damage is named, and the rest of `info` still shown."""
    from featurestore.inspect import mass_by_rank
    from featurestore.reader import CacheReader

    try:
        return mass_by_rank(CacheReader.open(store))
    except MissingFeatureError:
        return None
    except FeatureStoreError as error:
        sys.stderr.write(f"distily-cache: mass by rank is left out: {error}\n")
        return None


def _reporter() -> Any:
    from pipeline.progress import ConsoleReporter

    return ConsoleReporter(Console(stderr=True))


def _say(line: str) -> None:
    Console(stderr=True).print(line, highlight=False, soft_wrap=True)


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _print_outcome(out: str, outcome: Any, as_json: bool) -> None:
    if as_json:
        _print_json({"store": out, **asdict(outcome)})
        return
    console = Console(stderr=True)
    if not outcome.tokens:
        added = f"{outcome.sidecar_size:,} bytes of the teacher's weights added; " * bool(
            outcome.sidecar_size
        )
        console.print(
            f"{added}nothing to generate: {out} already holds all {outcome.samples:,} samples",
            highlight=False,
            soft_wrap=True,
        )
        return
    rate = outcome.tokens / max(outcome.capture_seconds, 1e-9)
    console.print(
        f"{out}: {outcome.tokens:,} tokens captured in {outcome.capture_seconds:,.1f} s ({rate:,.0f} tok/s, "
        f"engine start {outcome.engine_seconds:,.1f} s), {outcome.size / outcome.tokens:,.1f} bytes/token",
        highlight=False,
        soft_wrap=True,
    )


@contextmanager
def _exit_codes() -> Iterator[None]:
    """Known errors become one line on stderr and the exit code of the contract; bugs keep their traceback."""
    try:
        yield
    except _USER_ERRORS as error:
        _fail(str(error), 2)
    except (PipelineError, FeatureStoreError) as error:
        _fail(str(error), 1)
    except KeyboardInterrupt:
        _fail("interrupted; the same command goes on where this one stopped", 1)


def _fail(message: str, code: int) -> None:
    sys.stderr.write("distily-cache: " + " ".join(message.split()) + "\n")
    raise typer.Exit(code)
