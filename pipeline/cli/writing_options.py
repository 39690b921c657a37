"""The options of `generate` and `plan` with which texts are written first."""

from __future__ import annotations

from typing import Annotated

import typer

ContinuationsOption = Annotated[
    int | None,
    typer.Option(
        help="Let the teacher continue each text N times, cut to --prompt-tokens, or with each chat before "
        "the assistant's last turn; the samples are then what it writes, and that alone is learned.",
        metavar="N",
    ),
]
StudentOption = Annotated[
    str | None,
    typer.Option(
        "--from-student",
        help="Let this student write instead (checkpoint directory or hub name), and the teacher score it.",
        metavar="CKPT",
    ),
]
PromptOption = Annotated[int | None, typer.Option(help="Tokens of a text to continue from. [default: 64]")]
TemperatureOption = Annotated[
    float | None,
    typer.Option(
        "--continuation-temperature",
        help="Temperature to sample at, up to 2; 0 takes the most probable token. [default: 1]",
    ),
]
NucleusOption = Annotated[
    float | None,
    typer.Option(
        "--continuation-top-p",
        help="Sample from the most probable tokens that together have this probability. [default: 1]",
    ),
]
MaxTokensOption = Annotated[
    int | None,
    typer.Option(
        "--continuation-max-tokens",
        help="Longest text; it ends earlier where the writer ends it. [default: 128]",
    ),
]
