"""Texts from files and hub data sets, and what a model says of them: nats, perplexity, bits per byte.

Every token of a document is predicted exactly once, in the rolling windows of lm-evaluation-harness with one
token of context, so that bits per byte compare models with different tokenizers: a window begins with the
last token of the one before, the first with the tokenizer's BOS (EOS where there is none), and the last one,
which predicts what is left, with as many tokens before these as make it a full window.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from distily.datafiles import UNDERSTOOD, iterate_rows, kind_of, read_text
from distily.errors import DataFileError
from distily.text import one_line
from student.errors import UserError
from student.evaluation.models import Side
from student.metrics import perplexity

_ROWS = 256  # logits in float32 at a time
DEFAULT_LENGTH = 1024


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """source: a file, or a hub data set as `name` or `name:config`. since: leave out rows whose date_column
    is an earlier day, written YYYY-MM-DD.
    """

    name: str
    source: str
    split: str = "train"
    column: str | None = None
    since: str | None = None
    date_column: str = "date"

    def documents(self) -> Iterator[str]:
        """The texts in their order; hub data sets are streamed. UserError for a source without texts."""
        path = Path(self.source).expanduser()
        if path.is_file() and kind_of(path) == "text":
            text = _read(path, self.source)
            if text.strip():
                yield text
            return
        rows = self._rows(path)
        for index, row in enumerate(rows):
            column = self._column(row)
            if self.since is not None and not self._recent(row):
                continue
            if not isinstance(row[column], str | None):
                raise UserError(f"--text-column {column}: row {index} of {self.source} holds no text there")
            if row[column] and row[column].strip():
                yield row[column]

    def revision(self) -> str | None:
        """What tells this text from a later one: a file's hash, a data set's commit where the hub answers."""
        path = Path(self.source).expanduser()
        if path.is_file():
            from blake3 import blake3

            return "blake3:" + blake3(path.read_bytes()).hexdigest()
        from huggingface_hub import HfApi

        try:
            return HfApi().dataset_info(self.source.partition(":")[0]).sha
        except Exception:  # the hub's client changed its HTTP library, and with it what it raises
            return None

    def _rows(self, path: Path) -> Iterable[dict[str, Any]]:
        if path.is_file():
            return self._rows_of_file(path)
        if path.exists() or self.source.startswith((".", "/", "~")):
            raise UserError(f"--text {self.source}: no such file")
        import datasets

        name, _, config = self.source.partition(":")
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)
        datasets.disable_progress_bars()
        try:
            rows = datasets.load_dataset(name, config or None, split=self.split, streaming=True)
            return _peeked(rows)
        except Exception as error:  # builders raise whatever their libraries do
            reason = one_line(error.__cause__ or error, None)
            raise UserError(
                f"--text {self.source}: no file, and no data set that can be read ({reason})"
            ) from error

    def _rows_of_file(self, path: Path) -> Iterator[dict[str, Any]]:
        if kind_of(path) is None:
            raise UserError(f"--text {self.source}: a file of another kind; give one of {UNDERSTOOD}")
        try:
            yield from iterate_rows(path)
        except DataFileError as error:
            raise UserError(f"--text {self.source}: cannot be read: {error}") from error

    def _column(self, row: dict[str, Any]) -> str:
        column = self.column or "text"
        if column not in row:
            raise UserError(
                f"--text-column {column}: the columns of {self.source} are {', '.join(row)}; name the one "
                "that holds the text"
            )
        return column

    def _recent(self, row: dict[str, Any]) -> bool:
        if self.date_column not in row:
            raise UserError(
                f"--date-column {self.date_column}: the columns of {self.source} are {', '.join(row)}; name "
                "the one that holds the dates"
            )
        try:
            day = date.fromisoformat(str(row[self.date_column])[:10])
        except ValueError:
            raise UserError(
                f"--since: {self.source} holds {row[self.date_column]!r} in its column {self.date_column}, "
                "no date"
            ) from None
        return day >= date.fromisoformat(self.since or "")


def _peeked(rows: Any) -> Iterable[dict[str, Any]]:
    """The same rows; what is wrong with the first one is raised here."""
    next(iter(rows), None)
    again: Iterator[dict[str, Any]] = iter(rows)
    return again


def _read(path: Path, source: str) -> str:
    try:
        return read_text(path)
    except DataFileError as error:
        raise UserError(f"--text {source}: cannot be read: {error}") from error


def check_text(source: TextSource) -> None:
    """UserError where there is not one document."""
    if next(source.documents(), None) is None:
        since = f" since {source.since}" if source.since else ""
        raise UserError(f"--text {source.source}: it holds no text{since}")


def window_length(asked: int | None, sides: Sequence[Side]) -> int:
    """Positions of a window; UserError when a model does not take as many."""
    limit = min((side.positions for side in sides if side.positions is not None), default=None)
    if asked is None:
        return min(DEFAULT_LENGTH, limit or DEFAULT_LENGTH)
    if limit is not None and asked > limit:
        raise UserError(f"--max-seq-len {asked}: a model takes {limit} positions only")
    return asked


def prefix_token(tokenizer: Any) -> int:
    """The token before a document's first: BOS, or EOS where there is none."""
    first: int | None = (
        tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    )
    if first is None:
        raise UserError("--text: the tokenizer has neither BOS nor EOS, so nothing can precede a text")
    return first


def windows(tokens: Sequence[int], prefix: int, length: int) -> Iterator[tuple[list[int], list[int]]]:
    """(context, tokens to predict) of each window, at most `length` positions of input."""
    for start in range(0, len(tokens), length):
        stop = min(start + length, len(tokens))
        # All but a document's only window read `length` tokens, the one before their first included.
        context = list(tokens[stop - length - 1 : start]) if start else [prefix]
        yield context, list(tokens[start:stop])


@torch.no_grad()
def window_nats(model: Any, context: Sequence[int], tokens: Sequence[int]) -> float:
    """-log p(tokens | context), summed."""
    input_ids = torch.tensor([[*context, *tokens[:-1]]], device=model.device)
    logits_TV = model(input_ids=input_ids, use_cache=False).logits[0, len(context) - 1 :]
    labels_T = torch.tensor(tokens, device=logits_TV.device)
    parts = zip(torch.split(logits_TV, _ROWS), torch.split(labels_T, _ROWS), strict=True)
    return sum(
        torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum").item()
        for logits, labels in parts
    )


def cut(source: TextSource, tokenizer: Any, length: int, limit: int | None) -> Iterator[str]:
    """The documents, up to the end of the `limit`-th window of `tokenizer`, the student's. The teacher reads
    the same, whatever its own tokenizer.
    """
    left = math.inf if limit is None else limit
    for document in source.documents():
        if left <= 0:
            return
        if limit is None:
            yield document
            continue
        ends = [end for _, end in _encode(tokenizer, document).offset_mapping]
        sizes = [len(tokens) for _, tokens in windows(range(len(ends)), 0, length)][: int(left)]
        left -= len(sizes)
        if sizes:
            yield document[: ends[sum(sizes) - 1]]


def measure(model: Any, tokenizer: Any, documents: Iterable[str], length: int) -> dict[str, Any]:
    """{documents, tokens, bytes (UTF-8), ce in nats per token, perplexity, bits_per_byte}."""
    prefix = prefix_token(tokenizer)
    count = tokens = size = 0
    nats = 0.0
    for document in documents:
        ids = _encode(tokenizer, document).input_ids
        nats += sum(window_nats(model, *window) for window in windows(ids, prefix, length))
        count, tokens, size = count + 1, tokens + len(ids), size + len(document.encode())
    ce = nats / tokens
    return {
        "documents": count,
        "tokens": tokens,
        "bytes": size,
        "ce": ce,
        "perplexity": perplexity(ce),
        "bits_per_byte": nats / math.log(2) / size,
    }


def _encode(tokenizer: Any, document: str) -> Any:
    return tokenizer(document, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
