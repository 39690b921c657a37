"""Every kind of local data set gives the same documents; mixtures and unknown kinds are refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.documents import Documents, load_documents
from pipeline.errors import RequestError

TEXTS = ["the first document", "zweites Dokument: ä ö ü 你好", "a third\nwith two lines"]


def texts_of(documents: Documents) -> list[str]:
    assert not documents.chats
    return [text for _, text in documents.values]


def write(folder: Path, kind: str) -> Path:
    folder.mkdir()
    rows = {"text": TEXTS, "number": list(range(len(TEXTS)))}
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
    assert texts_of(load_documents(str(path), "train")) == TEXTS


def test_one_file_is_enough(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", "jsonl")
    assert texts_of(load_documents(str(folder / "data.jsonl"), "train", text_column="text")) == TEXTS


def test_kinds_do_not_mix(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", "jsonl")
    pq.write_table(pa.table({"text": TEXTS}), folder / "more.parquet")
    with pytest.raises(RequestError, match="files of one kind"):
        load_documents(str(folder), "train")


def test_unknown_kind_and_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"\0")
    with pytest.raises(RequestError, match=r"\.bin"):
        load_documents(str(tmp_path / "weights.bin"), "train")
    with pytest.raises(RequestError, match="no file of a known kind"):
        load_documents(str(tmp_path), "train")


def test_missing_split_names_those_there_are(tmp_path: Path) -> None:
    path = write(tmp_path / "data", "saved-splits")
    with pytest.raises(RequestError, match=r"--split test: .* has train"):
        load_documents(str(path), "test")


def test_a_column_of_numbers_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "data", "jsonl")
    with pytest.raises(RequestError, match="--text-column number"):
        texts_of(load_documents(str(path), "train", text_column="number"))


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved", "txt"])
def test_shuffling_permutes_and_depends_on_the_seed_alone(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.pipeline.test_texts.TEXTS", [f"document {i}" for i in range(400)])
    path = str(write(tmp_path / "data", kind))
    plain = texts_of(load_documents(path, "train"))
    shuffled = [texts_of(load_documents(path, "train", shuffle_seed=seed)) for seed in (0, 0, 1)]
    assert shuffled[0] == shuffled[1]
    assert len({tuple(order) for order in (plain, *shuffled)}) == 3
    assert all(Counter(order) == Counter(plain) for order in shuffled)


def test_a_shuffled_row_keeps_its_number(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"row {i}"}) for i in range(300)))
    documents = load_documents(str(path), "train", shuffle_seed=7)
    assert all(where == text for where, text in documents.values)


def rows(path: Path, *names: str) -> str:
    path.write_text(json.dumps({name: name for name in names}))
    return str(path)


def test_the_column_decides_what_a_data_set_is(tmp_path: Path) -> None:
    text, chats = rows(tmp_path / "text.jsonl", "text"), rows(tmp_path / "chats.jsonl", "messages", "source")
    both = rows(tmp_path / "both.jsonl", "messages", "text")
    assert not load_documents(text, "train").chats and load_documents(chats, "train").chats
    assert list(load_documents(chats, "train").values) == [("row 0", "messages")]
    with pytest.raises(RequestError, match="both a text and a messages column; say --text-column text or"):
        load_documents(both, "train")
    assert texts_of(load_documents(both, "train", text_column="text")) == ["text"]
    assert load_documents(both, "train", messages_column="messages").chats
    assert load_documents(both, "train", messages_column="text").chats
    assert texts_of(load_documents(chats, "train", text_column="source")) == ["source"]
    with pytest.raises(RequestError, match="one of the two"):
        load_documents(both, "train", text_column="text", messages_column="messages")
    with pytest.raises(RequestError, match=r"--messages-column talk: the columns of .* are text"):
        load_documents(text, "train", messages_column="talk")
    with pytest.raises(RequestError, match=r"--text-column text: the columns of .* are body;"):
        load_documents(rows(tmp_path / "neither.jsonl", "body"), "train")
