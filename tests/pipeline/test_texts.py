"""Every kind of local data set gives the same documents; mixtures and unknown kinds are refused."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import RequestError
from pipeline.texts import load_documents

TEXTS = ["the first document", "zweites Dokument: ä ö ü 你好", "a third\nwith two lines"]


def write(folder: Path, kind: str) -> Path:
    folder.mkdir()
    rows = {"text": TEXTS, "number": [1, 2, 3]}
    if kind == "jsonl":
        lines = [json.dumps({"text": text, "number": n}) for n, text in enumerate(TEXTS)]
        (folder / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")
    elif kind == "parquet":
        pq.write_table(pa.table(rows), folder / "data.parquet")
    elif kind == "arrow":
        datasets.Dataset.from_dict(rows).save_to_disk(folder / "saved")
        return next((folder / "saved").glob("*.arrow"))
    elif kind == "saved":
        datasets.Dataset.from_dict(rows).save_to_disk(folder / "saved")
        return folder / "saved"
    elif kind == "saved-splits":
        splits = datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows)})
        splits.save_to_disk(folder / "saved")
        return folder / "saved"
    else:
        for index, text in enumerate(TEXTS):
            (folder / f"{index}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow", "saved", "saved-splits", "txt"])
def test_documents_come_in_order(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / "data", kind)
    assert list(load_documents(str(path), "train", "text")) == TEXTS


def test_one_file_is_enough(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", "jsonl")
    assert list(load_documents(str(folder / "data.jsonl"), "train", "text")) == TEXTS


def test_kinds_do_not_mix(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", "jsonl")
    pq.write_table(pa.table({"text": TEXTS}), folder / "more.parquet")
    with pytest.raises(RequestError, match="files of one kind"):
        load_documents(str(folder), "train", "text")


def test_unknown_kind_and_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"\0")
    with pytest.raises(RequestError, match=r"\.bin"):
        load_documents(str(tmp_path / "weights.bin"), "train", "text")
    with pytest.raises(RequestError, match="no file of a known kind"):
        load_documents(str(tmp_path), "train", "text")


def test_missing_split_names_those_there_are(tmp_path: Path) -> None:
    path = write(tmp_path / "data", "saved-splits")
    with pytest.raises(RequestError, match=r"--split test: .* has train"):
        load_documents(str(path), "test", "text")


def test_a_column_of_numbers_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "data", "jsonl")
    with pytest.raises(RequestError, match="--text-column number"):
        list(load_documents(str(path), "train", "number"))
