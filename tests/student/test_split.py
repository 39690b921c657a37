"""The held-out split is by document: none on both sides, and no sample crosses over when a cache grows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featurestore.maintenance.merge import merge_stores
from featurestore.reader import CacheReader
from student.data.held_out import Split, is_held_out, split_cache
from student.errors import UserError
from tests import teachers
from tests.command import generate
from tests.student.splits import split_samples
from tests.teachers import text_of

Run = Callable[..., tuple[int, str, str]]
keys = st.integers(0, 2**64 - 1).map("{:016x}".format)
FRACTION = 0.3


@st.composite
def caches(draw: st.DrawFn) -> dict[str, list[tuple[str, ...]]]:
    """Sample id -> the documents that each task which holds it names; few documents, so that they meet."""
    pool = draw(st.lists(keys, min_size=1, max_size=8, unique=True))
    one = st.lists(st.sampled_from(pool), max_size=3, unique=True).map(tuple)
    names = draw(st.lists(keys.map(lambda key: key * 2), min_size=1, max_size=12, unique=True))
    return {name: draw(st.lists(one, min_size=1, max_size=2)) for name in names}


def split(cache: dict[str, list[tuple[str, ...]]], fraction: float = FRACTION) -> tuple[set[str], set[str]]:
    names = list(cache)
    try:
        found = split_samples(names, fraction, list(cache.values()))
    except UserError:
        return set(), set()
    return {names[i] for i in found.training}, {names[i] for i in found.held_out}


@given(cache=caches())
def test_no_document_is_on_both_sides(cache: dict[str, list[tuple[str, ...]]]) -> None:
    training, held_out = split(cache)
    known = {name: {key for copy in copies for key in copy} for name, copies in cache.items()}
    trained_on = {key for name in training for key in known[name]}
    assert not trained_on & {key for name in held_out for key in known[name]}
    for name in held_out:
        assert all(is_held_out(copy[0] if copy else name, FRACTION) for copy in cache[name])


@given(cache=caches(), more=caches(), first=st.data())
def test_growing_moves_no_sample_to_the_other_side(
    cache: dict[str, list[tuple[str, ...]]], more: dict[str, list[tuple[str, ...]]], first: st.DataObject
) -> None:
    """More samples, and more tasks of samples that are there, as merging brings them."""
    again = first.draw(st.lists(st.sampled_from(sorted(cache)), max_size=4))
    copies = list(more.values())
    grown = {name: list(known) for name, known in cache.items()}
    for number, name in enumerate(again):
        grown[name] += copies[number % len(copies)]
    grown |= {name: known for name, known in more.items() if name not in grown}
    training, held_out = split(cache)
    later_training, later_held_out = split(grown)
    assert not training & later_held_out and not held_out & later_training


def test_samples_of_unknown_documents_are_split_as_ever() -> None:
    names = [f"{number * 2**56:016x}" * 2 for number in range(256)]
    found = split_samples(names, 0.25, [[()]] * 256)
    assert found == split_samples(names, 0.25)
    assert found.held_out == [i for i, name in enumerate(names) if is_held_out(name, 0.25)]
    assert (found.left_out, found.unknown) == (0, 256)
    assert "256 samples do not name their documents" in str(found)
    assert str(split_samples(names, 0)) == ""


def test_one_document_is_not_divided() -> None:
    with pytest.raises(UserError, match="of the 2 in this cache, which come from 1 documents"):
        split_samples(["00" * 16, "ff" * 16], 0.5, [[("00" * 8,)], [("00" * 8,)]])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return teachers.llama(tmp_path_factory.mktemp("split") / "teacher")


def marked(count: int) -> list[str]:
    """Long texts, each with a word of its own at every second place."""
    return [" ".join(f"word{17 + n} {word}" for word in text_of(85, n).split()) for n in range(count)]


def texts_in(tokens: npt.NDArray[np.int32]) -> set[int]:
    """Which texts of `marked` a sample holds a part of; the word tokenizer has word17 at 17."""
    return set(tokens[tokens >= 17].tolist())


@pytest.mark.parametrize("pack", ["--pack", "--no-pack"])
def test_long_documents_do_not_leak(teacher: Path, tmp_path: Path, distily: Run, pack: str) -> None:
    """50 long documents: every held-out sample had neighbours of its document in training."""
    texts = marked(50)
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    generate(teacher, data, tmp_path / "store", "--top-k", 4, pack)
    reader = CacheReader.open(tmp_path / "store")
    found = split_cache(reader, 0.2)
    sides = [
        {text for index in side for text in texts_in(reader.read(index).tokens)}
        for side in (found.training, found.held_out)
    ]
    assert found.held_out and not sides[0] & sides[1]
    assert len(found.training) + len(found.held_out) + found.left_out == len(reader)
    assert (found.left_out > 0) == (pack == "--pack")
    starts = [texts_in(reader.read(index).tokens) for index in found.held_out]
    documents = found.held_out_documents
    assert len(set(documents)) < len(documents)
    if pack == "--no-pack":  # then a sample is of one document
        assert all(
            (starts[one] == starts[other]) == (documents[one] == documents[other])
            for one in range(len(starts))
            for other in range(one)
        )
    flags = ("--eval-fraction", 0.2, "--max-steps", 1, "--report-to", "none", "--json")
    code, out, err = distily("from-cache", tmp_path / "store", "--output-dir", tmp_path / "o", *flags)
    assert code == 0, err
    summary = json.loads(out)
    assert summary["train_samples"] == len(found.training)
    assert summary["held_out_samples"] == len(found.held_out)
    assert summary["left_out_samples"] == found.left_out
    assert summary["samples_of_unknown_documents"] == 0
    said = f"{found.left_out} samples are left out: they share a document with held-out ones"
    assert (said in err) == (pack == "--pack")
    card_code, _, _ = distily("card", tmp_path / "o")
    card = (tmp_path / "o" / "README.md").read_text()
    assert card_code == 0
    assert ("left out, for a document that is held out" in card) == (pack == "--pack")


def test_keys_survive_growing_merging_and_exporting(teacher: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    from pipeline.interchange.export import export_store

    texts = [text_of(150, seed) for seed in range(8)]
    for name, rows in {"a": texts[:5], "b": texts[3:]}.items():
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
        generate(teacher, data, tmp_path / name, "--top-k", 4)
    apart = {name: CacheReader.open(tmp_path / name) for name in ("a", "b")}
    known = {
        sample: copies[0]
        for reader in apart.values()
        for sample, copies in zip(reader.sample_ids, reader.documents(), strict=True)
    }
    assert all(len(copies) == 1 for copies in known.values()) and len(set(known.values())) == 8
    merge_stores(tmp_path / "all", [tmp_path / "a", tmp_path / "b"])
    merged = CacheReader.open(tmp_path / "all")
    for sample, copies in zip(merged.sample_ids, merged.documents(), strict=True):
        assert set(copies) == {known[sample]}
    # A further column group of the same samples keeps them, and so does the part of a store that is read.
    generate(teacher, tmp_path / "a.jsonl", tmp_path / "a", "--top-k", 4, "--hidden-layers", 1)
    again = CacheReader.open(tmp_path / "a")
    assert [copies[0] for copies in again.documents()] == [known[sample] for sample in again.sample_ids]
    assert again.read(0).documents == known[again.sample_ids[0]]
    export_store(tmp_path / "all", tmp_path / "out", "parquet", None)
    table = pq.read_table(tmp_path / "out")
    assert (
        dict(zip(table["id"].to_pylist(), map(tuple, table["documents"].to_pylist()), strict=True)) == known
    )


def test_texts_that_a_model_writes_belong_to_their_prompts_document(teacher: Path, tmp_path: Path) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps({"text": text_of(40, seed)}) + "\n" for seed in range(3)))
    flags = ("--continuations", 2, "--prompt-tokens", 8, "--continuation-max-tokens", 4)
    generate(teacher, data, tmp_path / "plain", "--top-k", 4)
    generate(teacher, data, tmp_path / "written", "--top-k", 4, *flags)
    plain, written = (CacheReader.open(tmp_path / name) for name in ("plain", "written"))
    whole = [plain.read(index) for index in range(len(plain))]
    by_prompt = {tuple(sample.tokens[:8].tolist()): sample.documents for sample in whole}
    assert len(written) >= len(by_prompt) == 3
    for index in range(len(written)):
        sample = written.read(index)
        assert sample.documents == by_prompt[tuple(sample.tokens[:8].tolist())] != ()


def test_a_split_is_a_record() -> None:
    assert str(Split(training=[0], held_out=[1])) == ""
