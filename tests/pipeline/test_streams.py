"""Data sets that are read from the first row to the last: the same rows as counted ones, of every kind."""

from __future__ import annotations

import bz2
import gzip
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from pipeline.data.bad_rows import Unusable
from pipeline.data.documents import load_documents
from pipeline.data.streams import HubStream, shuffled
from pipeline.errors import RequestError

TEXTS = [f"text {number}, with a comma" for number in range(700)]


def table_of(texts: list[str]) -> Any:
    return pa.table({"text": texts, "length": [len(text) for text in texts]})


def lines_of(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n\n" for text in texts).encode()


def write_arrow(file: Path, texts: list[str]) -> None:
    with pa.ipc.new_file(file, table_of(texts).schema) as writer:
        writer.write_table(table_of(texts), max_chunksize=100)


def zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, "zstd", asbytes=True))


WRITERS: dict[str, Callable[[Path, list[str]], Any]] = {
    ".jsonl": lambda file, texts: file.write_bytes(lines_of(texts)),
    ".json": lambda file, texts: file.write_text(json.dumps([{"text": text} for text in texts])),
    ".jsonl.gz": lambda file, texts: file.write_bytes(gzip.compress(lines_of(texts))),
    ".jsonl.bz2": lambda file, texts: file.write_bytes(bz2.compress(lines_of(texts))),
    ".jsonl.zst": lambda file, texts: file.write_bytes(zstd(lines_of(texts))),
    ".parquet": lambda file, texts: pq.write_table(table_of(texts), file, row_group_size=90),
    ".arrow": write_arrow,
    ".csv": lambda file, texts: pyarrow.csv.write_csv(table_of(texts), file),
}


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_stream_has_the_rows_of_the_files(tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, part in (("a", TEXTS[:500]), ("b", TEXTS[500:])):
        WRITERS[suffix](folder / f"{name}{suffix}", part)
    counted, streamed = (load_documents(str(folder), "train", streaming=how) for how in (False, True))
    for _ in range(2):
        assert list(streamed.values) == list(counted.values)
    assert [value for _, value in counted.values] == TEXTS
    reading = iter(streamed.values)
    for _ in range(600):
        next(reading)
    share = streamed.share()
    assert share is not None and 0.5 < share <= 1.0


def test_a_shuffled_stream_has_every_row_once_in_an_order_of_the_seed(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(lines_of(TEXTS))

    def read(seed: int) -> list[str]:
        return [
            text for _, text in load_documents(str(file), "train", shuffle_seed=seed, streaming=True).values
        ]

    assert read(0) == read(0) != read(1) and Counter(read(0)) == Counter(read(1)) == Counter(TEXTS)
    # Two texts of half the buffer's size each: one waits at most.
    long = [(str(number), str(number) * 2**25) for number in range(4)]
    assert sorted(name for name, _ in shuffled(long, 0)) == ["0", "1", "2", "3"]


def test_what_a_stream_cannot_do_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(lines_of(TEXTS))
    with pytest.raises(RequestError, match=r"--streaming: --split train\[:9\]: a slice"):
        load_documents(str(file), "train[:9]", streaming=True)
    with pytest.raises(RequestError, match=r"--text-column body: the columns of .* are text"):
        load_documents(str(file), "train", text_column="body", streaming=True)
    file.write_text('{"text": 3}\n')
    with pytest.raises(RequestError, match=r"--text-column text: .* holds int there, not text"):
        load_documents(str(file), "train", streaming=True)
    file.write_text("no JSON\n{\n")
    with pytest.raises(RequestError, match="its first line is no JSON"):
        load_documents(str(file), "train", streaming=True)
    file.write_text("")
    with pytest.raises(RequestError, match="it is empty"):
        load_documents(str(file), "train", streaming=True)
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(lines_of(TEXTS))[:-30])
    with pytest.raises(RequestError, match=r"cut\.jsonl\.gz: cannot be loaded: not whole"):
        list(load_documents(str(cut), "train", streaming=True).values)


def test_a_line_that_is_no_row_is_named(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "a"}\n[1]\n{\n{"text": 5}\n')
    values = list(load_documents(str(file), "train", streaming=True).values)
    reasons = [value.reason for _, value in values[1:] if isinstance(value, Unusable)]
    assert values[0] == ("row 0", "a") and [where for where, _ in values[1:]] == ["row 1", "row 2", "row 3"]
    assert reasons[0] == "is no JSON object" and "is no JSON: " in reasons[1] and "holds int" in reasons[2]


def test_a_split_of_the_hub_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` itself streams; it is only given a table instead of a name on the hub."""
    table = datasets.Dataset.from_dict({"text": TEXTS, "other": TEXTS}).to_iterable_dataset()
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **options: table if options["streaming"] else None
    )
    documents = load_documents("somebody/something", "train", streaming=True)
    assert [text for _, text in documents.values] == TEXTS and documents.share() is None
    stream = HubStream("somebody/something", None, "train")
    assert set(next(stream.rows(["text"]))) == {"text"}
