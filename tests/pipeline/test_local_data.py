"""Local data sets: what the files hold now, literal paths, splits as `datasets` names them, packed files."""

from __future__ import annotations

import bz2
import gzip
import json
import os
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.documents import load_documents, load_table
from pipeline.errors import RequestError

HOSTILE_NAMES = (
    "part[1].jsonl",
    "a*b?.jsonl",
    "[bold]x.jsonl",
    "-leading.jsonl",
    "two\nlines.jsonl",
    "a::b.jsonl",
    "{split}.jsonl",
    "100%.jsonl",
)


def texts_of(dataset: Path | str, split: str = "train", **options: object) -> list[str]:
    documents = load_documents(str(dataset), split, **options)  # type: ignore[arg-type]
    return [text for _, text in documents.values]


def jsonl(path: Path, *texts: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def parquet(path: Path, *texts: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": list(texts)}), path)
    return path


def zstd(content: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(content, asbytes=True))


def stream_zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue().to_pybytes())


# What the files hold now.


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv", "jsonl.gz", "txt", "saved"])
def test_new_content_of_the_same_size_and_time_is_read(tmp_path: Path, kind: str) -> None:
    seen = []
    for text in ("the old text", "the new text"):
        path = tmp_path / f"data.{kind}"
        if kind == "parquet":
            parquet(path, text)
        elif kind == "csv":
            path.write_text(f"text\n{text}\n")
        elif kind == "txt":
            path.write_text(text)
        elif kind == "saved":
            path = tmp_path / text.split()[1]
            datasets.Dataset.from_dict({"text": [text]}).save_to_disk(path)
            path = path.rename(tmp_path / "data") if not (tmp_path / "data").exists() else path
            if text == "the new text":
                (tmp_path / "data").rename(tmp_path / "gone")
                path = path.rename(tmp_path / "data")
        else:
            line = (json.dumps({"text": text}) + "\n").encode()
            path.write_bytes(gzip.compress(line, mtime=0) if kind.endswith("gz") else line)
        for file in path.rglob("*") if path.is_dir() else [path]:
            os.utime(file, (1_000_000_000, 1_000_000_000))
        seen.append(texts_of(path))
    assert seen == [["the old text"], ["the new text"]]


def test_a_table_is_of_the_new_content_too(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    seen = []
    for text in ("the old text", "the new text"):
        jsonl(path, text)
        os.utime(path, (1_000_000_000, 1_000_000_000))
        seen.append(load_table(str(path), "train")["text"][:])
    assert seen == [["the old text"], ["the new text"]]


# Literal paths.


@pytest.mark.parametrize("name", HOSTILE_NAMES)
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "jsonl.gz", "csv", "txt"])
def test_a_name_is_no_pattern(tmp_path: Path, name: str, kind: str) -> None:
    folder = tmp_path / "data [v1] *"
    folder.mkdir()
    for neighbour, text in ((name, "mine"), ("part1.jsonl", "neighbour"), ("ab.jsonl", "neighbour")):
        path = folder / neighbour.replace("jsonl", kind)
        if kind == "parquet":
            parquet(path, text)
        elif kind == "csv":
            path.write_text(f"text\n{text}\n")
        elif kind == "txt":
            path.write_text(text)
        else:
            line = (json.dumps({"text": text}) + "\n").encode()
            path.write_bytes(gzip.compress(line) if kind.endswith("gz") else line)
    asked = folder / name.replace("jsonl", kind)
    assert texts_of(asked) == ["mine"]
    assert sorted(texts_of(folder)) == ["mine", "neighbour", "neighbour"]
    if kind != "txt":
        assert load_table(str(asked), "train")["text"][:] == ["mine"]


# Splits.


def hub_folder(folder: Path) -> Path:
    parquet(folder / "data" / "train-00000-of-00002.parquet", "train 0")
    parquet(folder / "data" / "train-00001-of-00002.parquet", "train 1")
    parquet(folder / "data" / "test-00000-of-00001.parquet", "test")
    (folder / "README.md").write_text("# A data set\n")
    (folder / "LICENSE").write_text("free")
    (folder / ".gitattributes").write_text("*.parquet filter=lfs\n")
    (folder / "dataset_infos.json").write_text("{}")
    hidden = folder / ".cache" / "huggingface"
    jsonl(hidden / "train.jsonl", "hidden")
    return folder


def test_the_layout_of_the_hub(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "data")
    assert texts_of(folder) == ["train 0", "train 1"]
    assert texts_of(folder, "test") == ["test"]
    assert texts_of(folder, "train[1:]+test") == ["train 1", "test"]
    assert load_table(str(folder), "test")["text"][:] == ["test"]
    for split in ("nonsense", "validation", "train[:1]+nonsense"):
        with pytest.raises(RequestError, match=r"--split .*: .* has train, test"):
            texts_of(folder, split)
        with pytest.raises(RequestError, match=r"--split .*: .* has train, test"):
            load_table(str(folder), split)


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (("train.jsonl", "test.jsonl"), ("train", "test")),
        (("train/a.jsonl", "test/b.jsonl"), ("train", "test")),
        (("my-train-set.jsonl", "my-dev-set.jsonl"), ("train", "validation")),
        (("data/train-0.parquet", "data/validation-0.parquet"), ("train", "validation")),
        (("training/a.txt", "testing/b.txt"), ("train", "test")),
        (("data/extra-00000-of-00001.parquet", "data/train-00000-of-00001.parquet"), ("extra", "train")),
    ],
)
def test_splits_are_those_of_datasets(
    tmp_path: Path, names: tuple[str, ...], splits: tuple[str, ...]
) -> None:
    folder = tmp_path / "data"
    for name, split in zip(names, splits, strict=True):
        if name.endswith("txt"):
            (folder / name).parent.mkdir(parents=True)
            (folder / name).write_text(split)
        else:
            (jsonl if name.endswith("jsonl") else parquet)(folder / name, split)
    theirs = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    assert {split: theirs[split]["text"][:] for split in theirs} == {split: [split] for split in splits}
    for split in splits:
        assert texts_of(folder, split) == [split]


def test_a_file_without_a_split_beside_splits_is_refused(tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", "a")
    jsonl(tmp_path / "more.jsonl", "b")
    with pytest.raises(RequestError, match=r"more\.jsonl belongs to no split"):
        texts_of(tmp_path)


def test_a_folder_of_texts_is_no_folder_of_splits(tmp_path: Path) -> None:
    for name in ("README.md", "evaluation.md", "index.md"):
        (tmp_path / name).write_text(name)
    assert texts_of(tmp_path) == ["README.md", "evaluation.md", "index.md"]


def test_configurations_of_a_card_are_honoured(tmp_path: Path) -> None:
    jsonl(tmp_path / "en" / "train.jsonl", "english")
    jsonl(tmp_path / "de" / "train.jsonl", "deutsch")
    card = "---\nconfigs:\n- config_name: en\n  data_files: en/*\n- config_name: de\n  data_files:\n"
    card += "  - split: train\n    path: de/train.jsonl\n---\n# Languages\n"
    (tmp_path / "README.md").write_text(card)
    assert texts_of(tmp_path, config="en") == ["english"]
    assert texts_of(tmp_path, config="de") == ["deutsch"]
    for config in (None, "fr"):
        with pytest.raises(RequestError, match=r"--dataset-config.* has en, de"):
            texts_of(tmp_path, config=config)


def test_flags_that_do_not_apply_are_refused(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "data.jsonl", "a", "b", "c")
    text = tmp_path / "a.txt"
    text.write_text("a")
    saved = tmp_path / "saved"
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(saved)
    for path in (file, text, saved):
        with pytest.raises(RequestError, match=r"--split test: .* has train"):
            load_documents(str(path), "test")
        with pytest.raises(RequestError, match=r"--dataset-config en: .* has no configurations"):
            load_documents(str(path), "train", "en")
    with pytest.raises(RequestError, match="--dataset-config en"):
        load_table(str(file), "train", "en")
    assert texts_of(file, "train[:2]") == ["a", "b"]
    assert texts_of(file, "train[1:]") == ["b", "c"]
    assert texts_of(file, "train[-1:]") == ["c"]
    assert texts_of(file, "train[:34%]") == ["a"]
    for split in ("train[x]", "train[", "", "train[:0]", "train[:1] train"):
        with pytest.raises(RequestError, match=r"--split|empty"):
            texts_of(file, split)


def test_saved_splits_take_slices(tmp_path: Path) -> None:
    parts = {"train": ["a", "b"], "test": ["c"]}
    saved = datasets.DatasetDict({k: datasets.Dataset.from_dict({"text": v}) for k, v in parts.items()})
    saved.save_to_disk(tmp_path / "saved [1]")
    assert texts_of(tmp_path / "saved [1]", "train[1:]+test") == ["b", "c"]


# Kinds of files.


ROWS = [{"text": "the first"}, {"text": "zweitens ä 你"}, {"text": "a third\nwith two lines"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
CSV = b'text,n\nthe first,1\nzweitens \xc3\xa4 \xe4\xbd\xa0,2\n"a third\nwith two lines",3\n'
KINDS = {
    "data.jsonl.gz": gzip.compress(LINES),
    "data.ndjson": LINES,
    "data.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "data.json": json.dumps(ROWS, indent=2).encode(),
    "lines.json": LINES,
    "data.jsonl.zst": stream_zstd(LINES),
    "two-frames.jsonl.zst": stream_zstd(LINES[:20]) + stream_zstd(LINES[20:]),
    "data.jsonl.bz2": bz2.compress(LINES),
    "data.csv": CSV,
    "data.csv.gz": gzip.compress(CSV),
    "data.tsv": CSV.replace(b",", b"\t"),
    "data.csv.zst": stream_zstd(CSV),
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_files(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(KINDS[name])
    expected = [row["text"] for row in ROWS]
    assert texts_of(tmp_path / name) == expected
    assert sorted(texts_of(tmp_path, shuffle_seed=1)) == sorted(expected)
    assert load_table(str(tmp_path / name), "train")["text"][:] == expected


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_packed_texts(tmp_path: Path, suffix: str) -> None:
    pack = gzip.compress if suffix == "gz" else stream_zstd
    (tmp_path / f"a.txt.{suffix}").write_bytes(pack("ein Text ä".encode()))
    assert texts_of(tmp_path) == ["ein Text ä"]


def test_words_of_a_table_stay_words(tmp_path: Path) -> None:
    """pandas takes NA, null and None for missing, and digits for numbers."""
    (tmp_path / "data.csv").write_text("text\nNA\nnull\n007\nNone\n1e5\n")
    assert texts_of(tmp_path / "data.csv") == ["NA", "null", "007", "None", "1e5"]


@pytest.mark.parametrize(
    "name", ["data.jsonl.gz", "data.jsonl.zst", "data.csv.gz", "data.jsonl.bz2", "a.txt.gz"]
)
@pytest.mark.parametrize("how", ["cut", "other"])
def test_broken_packed_files(tmp_path: Path, name: str, how: str) -> None:
    lines = "".join(json.dumps({"text": os.urandom(40).hex()}) + "\n" for _ in range(200)).encode()
    packed = {"gz": gzip.compress, "zst": stream_zstd, "bz2": bz2.compress}[name.rpartition(".")[2]](lines)
    (tmp_path / name).write_bytes(packed[: len(packed) // 2] if how == "cut" else lines)
    with pytest.raises(RequestError, match=rf"DATASET .*{name}: cannot be"):
        texts_of(tmp_path / name)


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz", "a.xlsx", "a.bin", "a", "a.jsonl.xz"])
def test_unknown_kinds_list_what_is_understood(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(RequestError, match=r"\.jsonl.*\.parquet.*\.csv.*\.txt.*\.gz, \.zst"):
            load_documents(str(path), "train")


def test_an_archive_beside_data_is_not_passed_over(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", "a")
    (tmp_path / "b.zip").write_bytes(b"x")
    with pytest.raises(RequestError, match=r"b\.zip"):
        load_documents(str(tmp_path), "train")
