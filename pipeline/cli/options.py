"""The flags that commands share."""

from __future__ import annotations

from typing import Annotated

import typer

StoreArgument = Annotated[
    str, typer.Argument(metavar="STORE", help="Feature store: a directory, s3://bucket/prefix or gs://...")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")]
QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print errors, and what was left out, and nothing else.")
]
OutOption = Annotated[
    str,
    typer.Option(
        "--out", help="Feature store to create or to extend: a directory, s3://bucket/prefix or gs://..."
    ),
]
ShardOption = Annotated[
    int, typer.Option(help="Positions per shard, the unit of commit: what a kill can cost at most.")
]
ShardSizeOption = Annotated[
    int | None,
    typer.Option(
        "--shard-tokens",
        help="Positions per shard, the unit of commit: what a kill can cost at most. (default: what this "
        "machine captures in 5 minutes, at most 32768; the first shard is smaller)",
    ),
]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Allow the teacher's own Python code to run.")
]
