"""The flags that commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.cli.request_flags import info_of

StoreArgument = Annotated[
    str, typer.Argument(metavar="STORE", help="Feature store: a directory, s3://bucket/prefix or gs://...")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")]
QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print errors, and what was left out, and nothing else.")
]
ShardOption = Annotated[
    int, typer.Option(help="Positions per shard, the unit of commit: what a kill can cost at most.")
]
# What `import` takes as `generate` does.
DatasetArgument = Annotated[str, info_of("dataset")]
OutOption = Annotated[str, info_of("out")]
SplitOption = Annotated[str, info_of("split")]
ConfigOption = Annotated[str | None, info_of("dataset_config")]
TrustOption = Annotated[bool, info_of("trust_remote_code")]
