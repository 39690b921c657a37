"""Commands that bring features into a store and out of it: merge, export, import."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from distily.system.stopping import advise
from pipeline.cli.exits import RESUMES, exit_codes
from pipeline.cli.options import (
    ConfigOption,
    DatasetArgument,
    JsonOption,
    OutOption,
    ShardOption,
    SplitOption,
    StoreArgument,
    TrustOption,
)
from pipeline.cli.output import console, print_json, say


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
    from featurestore.maintenance.merge import merge_stores
    from pipeline.progress import bytes_progress

    advise(RESUMES)
    with exit_codes():
        with bytes_progress(console(stderr=True), "merge") as advance:
            merged = merge_stores(store, sources, advance)
        if as_json:
            print_json({"store": str(store), **merged.to_json()})
        else:
            say(
                f"{store}: {merged.tasks:,} shards, {merged.bytes:,} bytes copied; manifest {merged.manifest}"
            )


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
        str, typer.Option(help="Column groups, e.g. logits,hidden.L2. (default: all that every sample has)")
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """Write the samples of STORE with their features as one row each, for other tools to read.

    Example: distily-cache export ./cache ./rows --groups logits
    """
    from pipeline.interchange.export import export_store
    from pipeline.progress import count_progress

    with exit_codes():
        kinds = [kind.strip() for kind in groups.split(",") if kind.strip()] or None
        with count_progress(console(stderr=True), "export") as advance:
            exported = export_store(store, out, format_name, kinds, advance)
        if as_json:
            print_json({"out": str(out), **exported.to_json()})
        else:
            say(f"{out}: {exported.samples:,} samples, {exported.tokens:,} tokens, {exported.bytes:,} bytes")


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
            help="DistillKit's compression configuration. (default: compression_config.yaml beside it)"
        ),
    ] = None,
    targets: Annotated[
        str | None,
        typer.Option(
            help="Token that row t describes: next, or own (axolotl before June 2025). "
            "(default: next, and refused where that does not fit)"
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
    from pipeline.interchange.importing import ImportRequest, import_dataset
    from pipeline.progress import count_progress

    advise(RESUMES)
    with exit_codes():
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
        with count_progress(console(stderr=True), "import") as advance:
            outcome = import_dataset(request, advance)
        if as_json:
            print_json({"store": str(out), **asdict(outcome)})
        else:
            say(
                f"{out}: {outcome.samples:,} samples, {outcome.written:,} tokens written, "
                f"{outcome.unknown:,} positions without a distribution, "
                f"{outcome.renormalised:,} brought down to a mass of one"
            )
