"""Stores whose files are links, pipes or folders: nothing outside is read, written or removed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from featurestore.errors import CorruptionError, FeatureStoreError
from featurestore.format.schema import LogitsSpec, group_id
from featurestore.maintenance.gc import collect
from featurestore.maintenance.trusted import trusted_files
from featurestore.maintenance.verify import verify_store
from featurestore.reader import CacheReader
from featurestore.storage.root import root_of
from featurestore.store import FeatureStore
from tests.featurestore.conftest import Filled, copy_of, fill

LOGITS = LogitsSpec(4, tail=3)
LEADS_OUT = "leads out of the store"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Filled:
    return fill(tmp_path_factory.mktemp("sound") / "store", [LOGITS], count=3, shard_tokens=1000)


@pytest.fixture
def victim(sound: Filled, tmp_path: Path) -> Filled:
    return copy_of(sound, tmp_path / "store")


def read_all(store: Path) -> None:
    reader = CacheReader.open(store)
    for index in range(len(reader)):
        reader.read(index)


def out_of_the_way(path: Path, outside: Path) -> Path:
    """The same content outside of the store, and a link to it in its place: its hashes are right."""
    target = outside / path.name
    outside.mkdir(exist_ok=True)
    shutil.move(path, target)
    path.symlink_to(target, target_is_directory=target.is_dir())
    return target


@pytest.mark.parametrize(
    "pattern",
    [
        "SPEC.json",
        "MANIFEST-*",
        "segments",
        "segments/*",
        "parts",
        "parts/*",
        f"parts/*/{group_id(LOGITS)}",
        f"parts/*/{group_id(LOGITS)}/lse/c/0",
        "parts/*/samples.parquet",
    ],
)
def test_links_that_lead_out(victim: Filled, tmp_path: Path, pattern: str) -> None:
    out_of_the_way(next(victim.path.glob(pattern)), tmp_path / "outside")
    with pytest.raises(FeatureStoreError, match=LEADS_OUT) as caught:
        read_all(victim.path)
    assert "\n" not in str(caught.value)
    assert any(LEADS_OUT in problem.what for problem in verify_store(victim.path, deep=True).problems)
    # Nor is it uploaded.
    digest = next(victim.path.glob("MANIFEST-*")).stem.removeprefix("MANIFEST-")
    with pytest.raises(CorruptionError, match=LEADS_OUT):
        trusted_files(root_of(victim.path), digest)


@pytest.mark.parametrize("pattern", ["commit", "commit/samples", "commit/*/*.json"])
def test_links_that_lead_out_of_what_readers_do_not_read(
    victim: Filled, tmp_path: Path, pattern: str
) -> None:
    """Segments say what the records say, and an audit compares them."""
    out_of_the_way(next(victim.path.glob(pattern)), tmp_path / "outside")
    read_all(victim.path)
    try:
        said = [problem.what for problem in verify_store(victim.path, deep=True).problems]
    except CorruptionError as error:
        said = [str(error)]
    assert any(LEADS_OUT in what for what in said)


def test_links_inside_and_a_store_behind_a_link(victim: Filled, tmp_path: Path) -> None:
    """As of a user who keeps a store on another disk, or two names for one file."""
    link = tmp_path / "link"
    link.symlink_to(victim.path, target_is_directory=True)
    spec = victim.path / "SPEC.json"
    spec.rename(victim.path / "the-spec")
    spec.symlink_to("the-spec")
    read_all(link)
    assert verify_store(link, deep=True).sound


@pytest.mark.parametrize("kind", ["link", "listed", "pipe", "folder"])
def test_what_lies_in_the_teachers_folder(victim: Filled, tmp_path: Path, kind: str) -> None:
    """transformers would read it, and a student be given a copy of whatever it is."""
    secret = tmp_path / "secret"
    secret.write_text("{}")
    FeatureStore.open(victim.path).put_teacher_files({"config.json": b"{}"})
    assert (CacheReader.open(victim.path).teacher_dir / "config.json").read_bytes() == b"{}"
    place = victim.path / "teacher" / ("config.json" if kind == "listed" else "tokenizer_config.json")
    place.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    else:
        place.symlink_to(secret)
    wanted = LEADS_OUT if "li" in kind else "not a regular file"
    with pytest.raises(CorruptionError, match=wanted):
        _ = CacheReader.open(victim.path).teacher_dir


def test_pipes_do_not_hold_up_a_reader_or_a_writer(victim: Filled) -> None:
    """To open one is to wait for ever for somebody to write."""
    (victim.path / "teacher").mkdir(exist_ok=True)
    os.mkfifo(victim.path / "teacher" / "vocab.txt")
    with pytest.raises(CorruptionError, match="not a regular file"):
        FeatureStore.open(victim.path).put_teacher_files({"vocab.txt": b"a"})
    file = next(victim.path.glob("parts/*/samples.parquet"))
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(CorruptionError, match="not a regular file"):
        read_all(victim.path)
    assert verify_store(victim.path, deep=True).problems


def test_nothing_is_written_through_a_link(victim: Filled, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    store = FeatureStore.open(victim.path)
    shutil.rmtree(victim.path / "provenance", ignore_errors=True)
    (victim.path / "provenance").symlink_to(outside, target_is_directory=True)
    with pytest.raises(CorruptionError, match=LEADS_OUT):
        store.add_provenance({"command": "generate"})
    assert not any(outside.iterdir())


def test_garbage_that_is_a_link_is_removed_and_not_what_it_names(victim: Filled, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("keep")
    bundle = victim.path / "parts" / f"{'0' * 16}-{'0' * 12}"
    bundle.symlink_to(outside, target_is_directory=True)
    assert collect(victim.path, delete=True, min_age=0.0).deleted
    assert not bundle.is_symlink() and (outside / "precious").read_text() == "keep"


def test_a_file_in_place_of_a_folder(victim: Filled) -> None:
    shutil.rmtree(victim.path / "commit")
    (victim.path / "commit").write_text("")
    with pytest.raises(CorruptionError, match="not a directory"):
        verify_store(victim.path, deep=False)
