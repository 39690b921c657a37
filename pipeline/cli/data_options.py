"""The flags of `distily-cache` that say which data, and what of it."""

from __future__ import annotations

from typing import Annotated

import typer

DatasetArgument = Annotated[
    str,
    typer.Argument(
        metavar="DATASET",
        help="Local file or folder of .txt, .md, .jsonl, .json, .csv, .tsv, .parquet or .arrow, also with "
        ".gz, .zst or .bz2 behind it; a saved `datasets` directory, or a hub name.",
    ),
]
SplitOption = Annotated[str, typer.Option(help="Split, or a slice of it: train[:1000], train[:10%]+test.")]
ConfigOption = Annotated[
    str | None, typer.Option(help="Configuration of a data set that has several, e.g. 20231101.en.")
]
TextOption = Annotated[
    str | None,
    typer.Option(
        "--text-column",
        help="Column that holds texts. (default: text; a data set with both text and messages needs this "
        "flag or --messages-column)",
    ),
]
MessagesOption = Annotated[
    str | None,
    typer.Option(
        "--messages-column",
        help="Column that holds chats, lists of {role, content} or of {from, value}, which the chat template "
        "turns into text. (default: messages, conversations, or the columns of Alpaca, whichever is there)",
    ),
]
TemplateOption = Annotated[
    str | None,
    typer.Option(
        "--chat-template", metavar="FILE", help="Jinja chat template to use instead of the tokenizer's own."
    ),
]
LossOption = Annotated[
    str | None,
    typer.Option(
        "--loss-on",
        help="Tokens that a student learns: all, or assistant: what it says and the end of its turn. "
        "(default: assistant for chats, all for texts)",
    ),
]
ShuffleOption = Annotated[
    int | None,
    typer.Option(
        "--shuffle-seed",
        help="Shuffle the documents by this seed before samples are taken. (default: in order)",
    ),
]
SamplesOption = Annotated[
    int | None, typer.Option(help="Capture the first N samples only (after cutting or packing).")
]
ShortestOption = Annotated[
    int | None, typer.Option("--min-seq-len", help="Leave out samples of fewer tokens. (default: 2)")
]
LengthOption = Annotated[
    int | None, typer.Option(help="Longest sample in tokens. (default: 2048, or the model's limit if lower)")
]
LongOption = Annotated[
    str,
    typer.Option(
        "--long", help="Documents over --max-seq-len: split them into several samples, or drop them."
    ),
]
BadRowsOption = Annotated[
    str,
    typer.Option(
        "--bad-rows",
        help="Rows that cannot be used, e.g. a chat that the template refuses: refuse the data set and say "
        "how many there are, or drop them and say how many were dropped.",
    ),
]
PackOption = Annotated[
    bool,
    typer.Option(
        "--pack/--no-pack",
        help="Join documents with the end-of-sequence token into full samples, "
        "instead of cutting each document on its own.",
    ),
]
EndOption = Annotated[
    bool,
    typer.Option(
        "--append-eos/--no-append-eos",
        help="Put the end-of-sequence token behind each text, where the tokenizer does not, so that students "
        "learn where a text ends.",
    ),
]
