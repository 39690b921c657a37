"""Commands that share a store through the hub: push, pull."""

from __future__ import annotations

from typing import Annotated

import typer

from distily.system.stopping import advise
from pipeline.cli.exits import RESUMES, exit_codes
from pipeline.cli.options import JsonOption, StoreArgument
from pipeline.cli.output import print_json, say

RepoArgument = Annotated[str, typer.Argument(metavar="REPO", help="Data set on the hub: OWNER/NAME.")]


def push(
    store: StoreArgument,
    repo: RepoArgument,
    private: Annotated[bool, typer.Option("--private", help="Make a new REPO that only you see.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Upload STORE to the data set REPO on the hub, with a card that says what it is.

    What the current manifest names is checked and uploaded, and nothing else that lies in STORE.

    Example: distily-cache push ./cache me/smollm2-features --private
    """
    from pipeline.interchange.hub import push_store

    advise(RESUMES)
    with exit_codes():
        pushed = push_store(store, repo, private)
        if as_json:
            print_json({"store": str(store), **pushed.to_json()})
        else:
            say(f"{pushed.url}: {pushed.files:,} files, {pushed.bytes:,} bytes; manifest {pushed.manifest}")


def pull(
    repo: RepoArgument,
    store: Annotated[str, typer.Argument(metavar="STORE", help="New directory to download to.")],
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of REPO. (default: main)")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Download the store in the data set REPO of the hub; it appears at STORE once every byte is verified.

    Killed at any moment, the same command resumes.

    Example: distily-cache pull me/smollm2-features ./cache
    """
    from pipeline.interchange.hub import pull_store

    advise(RESUMES)
    with exit_codes():
        pulled = pull_store(repo, store, revision)
        if as_json:
            print_json({"store": store, **pulled.to_json()})
        else:
            say(f"{store}: {pulled.files:,} files, {pulled.bytes:,} bytes; manifest {pulled.manifest}")
