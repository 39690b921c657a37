"""Commands that look at a store and look after it: info, verify, ls, gc."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from distily.text import one_line
from featurestore.errors import FeatureStoreError, MissingFeatureError
from pipeline.cli.exits import exit_codes
from pipeline.cli.options import JsonOption, StoreArgument
from pipeline.cli.output import console, print_json
from pipeline.errors import RequestError


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
    from featurestore.maintenance.info import store_info
    from pipeline.report.tables import render_info
    from pipeline.report.terminal import render_ranks, render_sizes

    with exit_codes():
        if sample is not None:
            _show_sample(store, sample, tokens, as_json)
            return
        found = store_info(store)
        ranks = _mass_by_rank(store) if found.manifest else None
        if as_json:
            print_json({**found.to_json(), "mass_by_rank": None if ranks is None else ranks.to_json()})
            return
        shown = console()
        render_info(shown, found)
        render_sizes(shown, found)
        if ranks is not None:
            render_ranks(shown, ranks)


def verify(
    store: StoreArgument,
    deep: Annotated[bool, typer.Option("--deep", help="Read every byte and decode every row.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Check that STORE holds what was committed; exit code 1 if it does not.

    Without --deep the records, the files and their sizes are checked.
    """
    from featurestore.maintenance.verify import verify_store
    from pipeline.progress import count_progress
    from pipeline.report.tables import render_report

    with exit_codes():
        with count_progress(console(stderr=True), "verify") as advance:
            report = verify_store(store, deep, advance)
        if as_json:
            print_json(report.to_json())
        else:
            render_report(console(), report)
        if report.problems:
            raise typer.Exit(1)


def list_command(store: StoreArgument, as_json: JsonOption = False) -> None:
    """List the shards of STORE: samples, tokens, column groups, bytes."""
    from featurestore.maintenance.listing import list_shards
    from pipeline.report.tables import render_shards

    with exit_codes():
        shards = list_shards(store)
        if as_json:
            print_json([shard.to_json() for shard in shards])
        else:
            render_shards(console(), shards)


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
    from featurestore.maintenance.gc import collect
    from pipeline.report.tables import render_collection

    with exit_codes():
        found = collect(store, delete, min_age)
        if as_json:
            print_json(found.to_json())
        else:
            render_collection(console(), found)


def _show_sample(store: str, index: int, tokens: int, as_json: bool) -> None:
    from featurestore.maintenance.inspect import look_at
    from featurestore.reader import CacheReader
    from pipeline.report.terminal import render_sample, sample_json
    from pipeline.report.token_text import load_pieces

    reader = CacheReader.open(store)
    if not 0 <= index < len(reader):
        raise RequestError(f"--sample {index}: {store} has {len(reader)} samples, 0 to {len(reader) - 1}")
    view, pieces = look_at(reader, index, tokens), load_pieces(reader.teacher_dir)
    if as_json:
        print_json(sample_json(view, pieces))
    else:
        render_sample(console(), view, pieces)


def _mass_by_rank(store: str) -> Any:
    """None where there are no logits; damage is named, and the rest of `info` still shown."""
    from featurestore.maintenance.inspect import mass_by_rank
    from featurestore.reader import CacheReader

    try:
        return mass_by_rank(CacheReader.open(store))
    except MissingFeatureError:
        return None
    except FeatureStoreError as error:
        sys.stderr.write(f"distily-cache: mass by rank is left out: {one_line(error, None)}\n")
        return None
