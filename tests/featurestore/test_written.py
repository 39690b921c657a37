"""Written texts: what goes in comes out, nothing else is believed, and nothing that is kept is lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featurestore.errors import FeatureStoreError, StoreFormatError
from featurestore.format.written import (
    Text,
    WriterSpec,
    piece_name,
    piece_names,
    prompt_id,
    publish_texts,
    read_piece,
    read_texts,
)
from featurestore.identity import header, seal
from featurestore.maintenance.gc import collect
from featurestore.maintenance.merge import merge_stores
from featurestore.maintenance.verify import verify_store
from featurestore.storage.local import LocalRoot
from featurestore.storage.protocol import Root
from featurestore.storage.root import root_of
from featurestore.store import FeatureStore
from tests.featurestore.helpers import identity
from tests.s3 import Bucket

SPEC = WriterSpec(
    digest="ab" * 32,
    engine="vllm",
    dtype="bfloat16",
    temperature=0.8,
    top_p=0.95,
    max_tokens=12,
    seed=7,
    ends=(0, 2),
)


def text(prompt: int, number: int, *tokens: int) -> Text:
    return Text((prompt_id(np.array([prompt])), number), np.array(tokens, dtype=np.int32))


PIECES = [
    [text(1, 0, 5, 6, 2), text(1, 1, 9), text(2, 0, *range(3, 15))],
    [text(2, 1, 2)],
]


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    made = FeatureStore.create(tmp_path / "store", identity())
    for piece in PIECES:
        publish_texts(made.root, SPEC, piece)
    return made


def as_lists(texts: dict[Any, Any]) -> dict[Any, list[int]]:
    return {key: tokens.tolist() for key, tokens in texts.items()}


WANTED = {one.key: one.tokens.tolist() for piece in PIECES for one in piece}


def test_texts_come_back_from_a_directory_and_a_bucket(store: FeatureStore, bucket: Bucket) -> None:
    remote = FeatureStore.create(bucket.url("texts"), identity())
    for piece in PIECES:
        publish_texts(remote.root, SPEC, piece)
    for root in (store.root, root_of(remote.path)):
        assert as_lists(read_texts(root, SPEC)) == WANTED
        assert as_lists(read_texts(root, replace(SPEC, seed=8))) == {}
    assert piece_names(store.root) == piece_names(remote.root) and len(piece_names(store.root)) == 2
    bucket.forget()
    assert verify_store(remote.path, deep=True).sound


ROWS = st.dictionaries(
    st.tuples(st.integers(0, 50), st.integers(0, 2**40)),
    st.tuples(st.lists(st.integers(3, 2**31 - 1), max_size=11), st.sampled_from([0, 2, 7])),
    min_size=1,
)


@given(ROWS)
def test_any_piece_round_trips(
    tmp_path_factory: pytest.TempPathFactory, rows: dict[tuple[int, int], Any]
) -> None:
    root = LocalRoot(tmp_path_factory.mktemp("root"))
    texts = [text(prompt, number, *body, last) for (prompt, number), (body, last) in rows.items()]
    publish_texts(root, SPEC, texts)
    spec, found = read_piece(root, piece_name(SPEC, [one.key for one in texts]))
    assert spec == SPEC and [one.key for one in found] == [one.key for one in texts]
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(found, texts, strict=True))
    assert all(one.tokens.dtype == np.int32 for one in found)


def test_who_comes_second_takes_what_is_there(store: FeatureStore) -> None:
    other = [text(1, 0, 8, 8, 8), text(1, 1, 2), text(2, 0, 4)]
    kept = publish_texts(store.root, SPEC, other)
    assert {one.key: one.tokens.tolist() for one in kept} == {one.key: WANTED[one.key] for one in other}
    assert as_lists(read_texts(store.root, SPEC)) == WANTED


def test_of_two_texts_with_one_key_every_reader_takes_the_same(store: FeatureStore) -> None:
    publish_texts(store.root, SPEC, [text(1, 0, 8, 8), text(3, 0, 2)])
    first = min(name for name in piece_names(store.root) if any(_is_first(store.root, name)))
    expected = next(one for one in read_piece(store.root, first)[1] if one.key == PIECES[0][0].key)
    assert read_texts(store.root, SPEC)[PIECES[0][0].key].tolist() == expected.tokens.tolist()


def _is_first(root: Root, name: str) -> list[bool]:
    return [one.key == PIECES[0][0].key for one in read_piece(root, name)[1]]


def test_gc_spares_them_and_merge_brings_them_along(store: FeatureStore, tmp_path: Path) -> None:
    folder = tmp_path / "store" / "written" / SPEC.id
    (folder / ".tmp-0123456789abcdef").write_bytes(b"half")
    found = collect(store.path, delete=True, min_age=0.0)
    assert [orphan.path for orphan in found.orphans] == [f"written/{SPEC.id}/.tmp-0123456789abcdef"]
    assert as_lists(read_texts(store.root, SPEC)) == WANTED
    target = FeatureStore.create(tmp_path / "target", identity())
    with pytest.raises(StoreFormatError, match="nothing is committed"):
        merge_stores(target.path, [store.path])
    assert as_lists(read_texts(target.root, SPEC)) == WANTED


def test_every_flipped_bit_is_seen(store: FeatureStore, tmp_path: Path) -> None:
    file = tmp_path / "store" / piece_names(store.root)[0]
    data = file.read_bytes()
    for place in range(0, len(data), 7):
        file.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        with pytest.raises(FeatureStoreError, match=file.name):
            read_texts(store.root, SPEC)
    report = verify_store(store.path, deep=False)
    assert [problem.path for problem in report.problems] == [str(file.relative_to(tmp_path / "store"))]


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.update(texts=[]),
        lambda r: r["texts"][0].append(1),
        lambda r: r["texts"][0][2].clear(),
        lambda r: r["texts"][0].__setitem__(2, [1.5]),
        lambda r: r["texts"][0].__setitem__(2, [True]),
        lambda r: r["texts"][0].__setitem__(2, [-1]),
        lambda r: r["texts"][0].__setitem__(2, [2**31]),
        lambda r: r["texts"][0].__setitem__(2, [5] * 13),
        lambda r: r["texts"][0].__setitem__(2, [2, 5]),
        lambda r: r["texts"][0].__setitem__(0, "../../escape"),
        lambda r: r["texts"][0].__setitem__(1, -1),
        lambda r: r["texts"][0].__setitem__(1, 5),
        lambda r: r.update(writer=None),
        lambda r: r["writer"].pop("seed"),
        lambda r: r["writer"].update(more=1),
        lambda r: r["writer"].update(temperature=-1.0),
        lambda r: r["writer"].update(top_p=0.0),
        lambda r: r["writer"].update(top_p=True),
        lambda r: r["writer"].update(max_tokens=0),
        lambda r: r["writer"].update(ends=[-2]),
        lambda r: r["writer"].update(ends=5),
        lambda r: r["writer"].update(seed=8),
    ],
)
def test_what_no_writer_writes_is_refused(store: FeatureStore, tmp_path: Path, change: Change) -> None:
    """Sealed properly, so that only the checks of the content stand in the way."""
    name = next(n for n in piece_names(store.root) if len(read_piece(store.root, n)[1]) == 3)
    rows = [[*one.key, one.tokens.tolist()] for one in PIECES[0]]
    record = {**header("written"), "writer": SPEC.to_json(), "texts": rows}
    assert (tmp_path / "store" / name).read_bytes() == seal(json.loads(json.dumps(record)))
    change(record)
    (tmp_path / "store" / name).write_bytes(seal(record))
    with pytest.raises(FeatureStoreError):
        read_piece(store.root, name)
