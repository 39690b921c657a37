"""The mirror of a store in object storage: what is downloaded, what heals, and what processes share."""

from __future__ import annotations

import multiprocessing
import random
import shutil
import threading
import time
from pathlib import Path

import pytest

from featurestore.errors import CorruptionError, StoreAccessError, StoreNotFoundError
from featurestore.format.schema import LogitsFeatures, group_id
from featurestore.maintenance.listing import list_shards
from featurestore.maintenance.verify import verify_store
from featurestore.reader import CacheReader
from tests.featurestore.conftest import SMALL, Filled, fill, read_everything
from tests.featurestore.helpers import assert_same
from tests.s3 import Bucket


def test_only_what_is_asked_for_is_downloaded(url: str, bucket: Bucket) -> None:
    reader = CacheReader.open(url)
    assert not any(name.startswith("parts/") for name in bucket.mirrored())
    reader.read(0, [SMALL[1]])
    data = {name.split("/")[2] for name in bucket.mirrored() if name.startswith("parts/")}
    assert data == {"samples.parquet", group_id(SMALL[1])}
    assert len({name.split("/")[1] for name in bucket.mirrored() if name.startswith("parts/")}) == 1
    list_shards(url)
    assert {name.split("/")[2] for name in bucket.mirrored() if name.startswith("parts/")} == data


def test_a_broken_mirror_is_not_a_broken_store(url: str, bucket: Bucket, small: Filled) -> None:
    read_everything(url, small.given)
    assert (CacheReader.open(url).teacher_dir / "config.json").read_bytes() == b"{}"
    chance = random.Random(2)
    files = sorted(path for path in bucket.mirrors.rglob("*") if path.is_file())
    assert len(files) > 40
    sound = {path: path.read_bytes() for path in files}
    for path, data in sound.items():
        flipped = bytearray(data)
        flipped[chance.randrange(len(data))] ^= 4
        path.write_bytes(chance.choice([b"", data[:-1], data + b"x", bytes(flipped)]))
    read_everything(url, small.given)
    assert (CacheReader.open(url).teacher_dir / "config.json").read_bytes() == b"{}"
    assert {path for path, data in sound.items() if path.read_bytes() == data} == set(files)


@pytest.mark.parametrize("harm", ["empty", "remove"])
def test_a_mirror_that_breaks_during_a_run_is_filled_again(
    url: str, bucket: Bucket, small: Filled, harm: str
) -> None:
    reader = CacheReader.open(url)
    reader.read(0)
    if harm == "remove":
        shutil.rmtree(bucket.mirrors)
    else:
        for path in bucket.mirrors.rglob("0"):
            if path.is_file():
                path.write_bytes(b"")
    for i in (0, len(reader) - 1):
        for spec, found in reader.read(i).features.items():
            assert_same(found, small.given[reader.sample_ids[i]][spec])


def test_warm_files_are_at_hand_and_trusted(url: str, bucket: Bucket, small: Filled) -> None:
    reader = CacheReader.open(url)
    warmer = threading.Thread(target=reader.warm, args=(0, SMALL))
    warmer.start()
    last = reader.read(len(reader) - 1, SMALL)
    warmer.join()
    assert last.id == reader.sample_ids[-1]
    for name in bucket.names("store"):
        if name.startswith("parts/"):
            bucket.write("store", name, None)
    for i in (index for index in range(len(reader)) if reader.shard(index) == reader.shard(0)):
        for spec, found in reader.read(i, SMALL).features.items():
            assert_same(found, small.given[reader.sample_ids[i]][spec])


def _entropy(reader: CacheReader, index: int) -> float:
    value = reader.read(index, SMALL[:1]).features[SMALL[0]]
    assert isinstance(value, LogitsFeatures)
    return float(value.entropy.sum())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes_fill_one_mirror(url: str, bucket: Bucket, method: str) -> None:
    """obstore's threads do not survive a fork; a forked worker must neither hang nor fail."""
    reader = CacheReader.open(url)
    assert not any(name.startswith("parts/") for name in bucket.mirrored())
    with multiprocessing.get_context(method).Pool(2) as pool:
        there = pool.starmap_async(_entropy, [(reader, i) for i in range(len(reader))] * 2).get(timeout=120)
    assert there == [_entropy(reader, i) for i in range(len(reader))] * 2


def test_a_forked_process_is_told_of_a_missing_object(url: str, bucket: Bucket) -> None:
    reader = CacheReader.open(url)
    for name in bucket.names("store"):
        if name.endswith("head_index/c/0"):
            bucket.write("store", name, None)
    with (
        multiprocessing.get_context("fork").Pool(1) as pool,
        pytest.raises(CorruptionError, match="head_index"),
    ):
        pool.apply_async(_entropy, (reader, 0)).get(timeout=120)


def test_another_store_at_the_same_url_has_another_mirror(url: str, bucket: Bucket, small: Filled) -> None:
    read_everything(url, small.given)
    for name in bucket.names("store"):
        bucket.write("store", name, None)
    with pytest.raises(StoreNotFoundError):
        CacheReader.open(url)
    time.sleep(1.1)  # the service tells time in whole seconds
    # The same teacher and the same tasks: only the random names of the bundles differ.
    filled = fill(url, SMALL, count=4, shard_tokens=60)
    assert verify_store(url, deep=True).sound
    read_everything(url, filled.given)


def test_a_mirror_that_cannot_be_written_is_named(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DISTILY_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(StoreAccessError) as caught:
        CacheReader.open(url)
    assert "DISTILY_CACHE_DIR" in str(caught.value) and "\n" not in str(caught.value)
