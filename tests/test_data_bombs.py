"""Small data files that would unpack to gigabytes: refused in one line, and those of people are read."""

from __future__ import annotations

import bz2
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import distily.datafiles
from distily.datafiles import iterate_rows, read_text
from distily.errors import DataFileError
from pipeline.data.documents import load_table
from pipeline.errors import RequestError

LONG = "x" * 2**20


def repeated(count: int) -> Any:
    """A column of so many values, all the same text of 1 MiB."""
    return pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), pa.array([LONG]))


def lists(count: int) -> Any:
    return pa.ListArray.from_arrays(pa.array(range(count + 1), pa.int32()), repeated(count))


BOMBS = {
    "texts": lambda: {"text": repeated(10_000)},
    "lists": lambda: {"text": lists(10_000)},
    "objects": lambda: {"text": pa.StructArray.from_arrays([repeated(10_000)], ["content"])},
    "run": lambda: {"text": pa.nulls(2**25 + 2**21, pa.int64())},
    "zeros": lambda: {"text": pa.array([bytes(2**24 + i) for i in range(6)])},
}


@pytest.mark.parametrize("kind", BOMBS)
def test_parquet_that_expands(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "data.parquet"
    pq.write_table(pa.table(BOMBS[kind]()), file, compression="zstd", row_group_size=2**30)
    assert file.stat().st_size < 200_000
    with pytest.raises(DataFileError, match=r"come to|are possible") as caught:
        next(iterate_rows(file))
    assert "\n" not in str(caught.value)


def test_a_data_set_is_refused_before_anything_is_converted(tmp_path: Path) -> None:
    file = tmp_path / "data.parquet"
    pq.write_table(pa.table(BOMBS["lists"]()), file, compression="zstd")
    with pytest.raises(RequestError, match=f"DATASET {re.escape(str(file))}: cannot be loaded: .* come to"):
        load_table(str(file), "train")


ROWS = [
    {
        "text": f"document {number} " * 30,
        "source": "wiki" if number % 3 else LONG[:1000],
        "chat": [{"role": "user", "content": "hi" * number}, {"role": "assistant", "content": "yes"}],
        "score": [number / 7] * (number % 50),
        "none": None,
        "map": {"a": "b"},
    }
    for number in range(300)
]


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dictionary": False},
        {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}},
        {"row_group_size": 7},
        {"data_page_size": 512, "dictionary_pagesize_limit": 512},
        {"compression": "none", "write_page_checksum": True},
    ],
)
def test_parquet_of_people_is_read(tmp_path: Path, version: str, options: dict[str, Any]) -> None:
    file = tmp_path / "data.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), file, data_page_version=version, **options)
    assert list(iterate_rows(file)) == pq.read_table(file).to_pylist()
    packed = tmp_path / "data.parquet.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    assert len(list(iterate_rows(packed))) == len(ROWS)


def test_many_different_words_are_counted_and_not_multiplied(tmp_path: Path) -> None:
    """A long text and a short one in a dictionary, the short one 2^20 times and the long one once."""
    file = tmp_path / "data.parquet"
    words = pa.DictionaryArray.from_arrays(pa.array([1] * 2**20 + [0], pa.int32()), pa.array([LONG, "no"]))
    pq.write_table(pa.table({"text": words}), file)
    assert next(iterate_rows(file))["text"] == "no"


@pytest.mark.parametrize("suffix", ["gz", "bz2", "zst"])
def test_packed_files_that_expand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    monkeypatch.setattr(distily.datafiles, "_SPARE", 2**16)  # so that the bombs may be small
    pack = {
        "gz": gzip.compress,
        "bz2": bz2.compress,
        "zst": lambda data: pa.Codec("zstd").compress(data, asbytes=True),
    }[suffix]
    file = tmp_path / f"corpus.txt.{suffix}"
    file.write_bytes(pack(json.dumps("a text of a person " * 1000).encode()))
    assert "a person" in read_text(file)
    if suffix == "gz":  # which cannot do better than what is possible
        return
    file.write_bytes(pack(bytes(2**23)))
    assert file.stat().st_size < 20_000
    with pytest.raises(DataFileError, match="unpacks to more than 1,032 times its size"):
        read_text(file)
