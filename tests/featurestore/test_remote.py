"""Stores in object storage, against a real S3 server: commits, garbage, damage, and errors in one line.

What holds for local and remote stores alike is tested in test_store.py, test_reader.py and test_info.py; what
the copies on this machine have to do with it, in test_mirror.py.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from featurestore.errors import (
    CorruptionError,
    FeatureStoreError,
    StoreAccessError,
    StoreFormatError,
    StoreNotFoundError,
    StoreWriteError,
)
from featurestore.format.schema import HiddenSpec
from featurestore.maintenance.gc import collect
from featurestore.maintenance.verify import verify_store
from featurestore.reader import CacheReader
from featurestore.storage.local import LocalRoot
from featurestore.storage.objects import Objects
from featurestore.storage.root import is_url, root_of
from featurestore.store import FeatureStore
from tests.featurestore.conftest import SMALL, Filled, fill, read_everything
from tests.featurestore.helpers import features, identity, sample, task_of
from tests.featurestore.test_damage import READ
from tests.proxy import Proxy
from tests.s3 import Bucket, free_port
from tests.stores import lasting


def test_a_name_is_taken_once(bucket: Bucket) -> None:
    """The commit protocol rests on this condition of the server's."""
    objects = Objects(bucket.url("store"))
    assert objects.create("a", b"first") and not objects.create("a", b"second")
    assert objects.create("a", b"first"), "equal bytes are our own, of a request whose reply was lost"
    assert bucket.read("store", "a") == b"first"


def test_threads_that_want_the_same_file_download_it_once(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a training and the thread that fetches ahead of it do."""
    for name in ("SPEC.json", "file"):
        bucket.write("store", name, b"content")
    root, blocks = root_of(bucket.url("store")), Objects.blocks
    asked: list[str] = []

    def slowly(self: Objects, name: str, limit: int) -> Iterator[bytes]:
        asked.append(name)
        time.sleep(0.3)
        yield from blocks(self, name, limit)

    monkeypatch.setattr(Objects, "blocks", slowly)
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(lambda _: root.load("file", lambda data, _: data), range(4)))
    assert loaded == [b"content"] * 4 and asked == ["file"]


def test_lost_replies_lose_nothing(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    with Proxy(bucket.endpoint, lose_replies=True).running() as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        assert root_of(bucket.url("one")).publish("x", b"data")
        assert not root_of(bucket.url("one")).publish("x", b"other")
        filled = fill(bucket.url("store"), SMALL, count=2)
    monkeypatch.setenv("AWS_ENDPOINT_URL", bucket.endpoint)
    assert {f"/{bucket.name}/store/{name}" for name in bucket.names("store")} <= proxy.lost
    assert verify_store(bucket.url("store"), deep=True).sound
    assert collect(bucket.url("store")).orphans == []
    read_everything(bucket.url("store"), filled.given)


def test_a_service_that_replaces_is_refused(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    with Proxy(bucket.endpoint, ignore="if-none-match").running() as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        with pytest.raises(StoreWriteError, match="ignores `If-None-Match"):
            FeatureStore.create(bucket.url("store"), identity())
    assert bucket.names("store") == []


def test_an_upload_that_did_not_arrive_is_not_committed(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = [sample(i) for i in range(2)]
    with Proxy(bucket.endpoint, swallow="/values/c/0/0").running() as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        store = FeatureStore.create(bucket.url("store"), identity())
        store.add_plan([task_of(samples)])
        with pytest.raises(StoreWriteError, match=r"values/c/0/0: \d+ bytes sent, 0 arrived"):
            store.write_bundle(task_of(samples), samples, features(samples, SMALL))
    assert not any(name.startswith(("parts/", "commit/")) for name in bucket.names("store"))


def test_a_service_that_goes_away_is_not_damage(
    url: str, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Proxy(bucket.endpoint).running() as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        reader = CacheReader.open(url)

        def leave(done: int, total: int) -> None:
            proxy.gone = True

        with pytest.raises(StoreAccessError, match="no answer"):
            verify_store(url, deep=True, progress=leave)
        with pytest.raises(StoreAccessError, match="no answer"):
            reader.read(0)


def test_the_losers_bundle_is_garbage_and_nothing_else_is(bucket: Bucket) -> None:
    url, samples = bucket.url("store"), [sample(i) for i in range(3)]
    task, given = task_of(samples), features(samples, SMALL)
    FeatureStore.create(url, identity()).add_plan([task])
    start, results = threading.Barrier(3), []

    def write() -> None:
        mine = FeatureStore.open(url)
        start.wait()
        results.append(mine.write_bundle(task, samples, given))

    threads = [threading.Thread(target=write) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3 and all(result == results[0] for result in results)
    FeatureStore.open(url).publish_manifest()
    winners = {record.bundle for record in results[0]}
    bundles = {name.split("/")[1] for name in bucket.names("store") if name.startswith("parts/")}
    assert len(bundles) == 3 > len(winners)
    losers = {f"parts/{bundle}" for bundle in bundles - winners}
    found = collect(url)
    assert {o.path for o in found.orphans} == losers and not any(o.removable for o in found.orphans)
    kept = {name for name in bucket.names("store") if not name.startswith(tuple(losers))}
    assert collect(url, delete=True, min_age=0).reclaimed > 0
    assert set(bucket.names("store")) == kept
    assert verify_store(url, deep=True).sound
    read_everything(url, {s.id: {spec: given[spec][i] for spec in SMALL} for i, s in enumerate(samples)})


KILLED = """
import os, signal, sys
from featurestore.storage.remote import RemoteRoot
from tests.featurestore.conftest import fill
from tests.featurestore.test_remote import SMALL
RemoteRoot.finish = lambda self, bundle: os.kill(os.getpid(), signal.SIGKILL)
fill(sys.argv[1], SMALL, count=4)
"""


def test_a_writer_killed_before_its_commit_leaves_garbage_only(bucket: Bucket) -> None:
    url = bucket.url("store")
    done = subprocess.run([sys.executable, "-c", KILLED, url], check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert any(name.startswith("parts/") for name in bucket.names("store"))
    assert FeatureStore.open(url).commits() == {}
    with pytest.raises(StoreFormatError, match="no manifest yet"):
        CacheReader.open(url)
    orphans = {o.path for o in collect(url).orphans}
    # What it has written, and the marker by which a publication would find it.
    assert sorted(name.partition("/")[0] for name in orphans) == ["parts", "pending"]
    filled = fill(url, SMALL, count=4)
    read_everything(url, filled.given)
    # The publication of `fill` has removed the marker, whose task it lists.
    orphans = {name for name in orphans if name.startswith("parts/")}
    assert {o.path for o in collect(url, delete=True, min_age=0).orphans} == orphans
    assert not any(name.startswith(tuple(orphans)) for name in bucket.names("store"))
    assert verify_store(url, deep=True).sound
    read_everything(url, filled.given)


def test_a_record_that_cannot_be_read_stops_the_collection(url: str, bucket: Bucket) -> None:
    bucket.write("store", "parts/0123456789abcdef-feedfeedfeed/samples.parquet", b"x")
    record = next(name for name in bucket.names("store") if name.startswith("commit/samples/"))
    bucket.write("store", record, b"")
    # What a manifest lists is known without its record.
    for name in bucket.names("store"):
        if name.startswith(("heads/", "MANIFEST-", "segments/")):
            bucket.write("store", name, None)
    with pytest.raises(CorruptionError, match=record):
        collect(url, delete=True, min_age=0)
    assert "parts/0123456789abcdef-feedfeedfeed/samples.parquet" in bucket.names("store")
    with pytest.raises(StoreNotFoundError):
        collect(bucket.url("nowhere"))


def test_every_damaged_object_is_named_and_never_read(bucket: Bucket, tmp_path: Path) -> None:
    filled = fill(tmp_path / "local", SMALL, count=2, shard_tokens=1000)
    bucket.upload(filled.path, "store")
    url, chance = bucket.url("store"), random.Random(5)
    names = bucket.names("store")
    for i, name in enumerate(names):
        data = bucket.read("store", name)
        other = bucket.read("store", names[i - 1])
        flipped = bytearray(data)
        flipped[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        damages = {"missing": None, "swapped": other, "grown": data + b"\0", "flipped": bytes(flipped)}
        what = chance.choice([kind for kind, value in damages.items() if value != data])
        if what == "missing" and name.startswith(("provenance/", "plan-")):
            continue
        bucket.write("store", name, damages[what])
        bucket.forget()
        deep = [problem.path for problem in verify_store(url, deep=True).problems]
        expected = "MANIFEST" if what == "missing" and name.startswith("MANIFEST-") else name
        assert expected in deep, f"{name} {what}"
        if what in ("missing", "grown") and name.startswith("parts/"):
            assert [problem.path for problem in verify_store(url, deep=False).problems] == [name]
        if name.startswith(READ):
            with pytest.raises(FeatureStoreError) as caught:
                read_everything(url, filled.given)
            message = str(caught.value)
            assert str(bucket.mirrors) not in message and bucket.name in message and "\n" not in message
        bucket.write("store", name, data)
    bucket.forget()
    report = verify_store(url, deep=True)
    assert report.sound and report.checked_bytes >= sum(len(bucket.read("store", name)) for name in names) / 2
    assert verify_store(url, deep=False).sound
    assert not bucket.mirrors.exists() or not bucket.mirrored(), "an audit keeps nothing"
    read_everything(url, filled.given)


def message_of(error: pytest.ExceptionInfo[BaseException]) -> str:
    assert "\n" not in str(error.value) and "Debug" not in str(error.value) and len(str(error.value)) < 300
    return str(error.value)


def test_what_cannot_be_reached_says_why_in_one_line(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreAccessError) as caught:
        CacheReader.open("s3://no-such-bucket/store")
    assert "s3://no-such-bucket/store: there is no such bucket" in message_of(caught)
    for call in (FeatureStore.open, collect, lambda url: verify_store(url, deep=True)):
        with pytest.raises(StoreAccessError, match="no such bucket"):
            call("s3://no-such-bucket/store")
    with pytest.raises(StoreWriteError, match="no such bucket"):
        FeatureStore.create("s3://no-such-bucket/store", identity())
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(StoreAccessError) as caught:
        CacheReader.open(bucket.url("store"))
    assert "AWS_ENDPOINT_URL" in message_of(caught)
    monkeypatch.setenv("AWS_ALLOW_HTTP", "false")
    with pytest.raises(StoreAccessError) as caught:
        CacheReader.open(bucket.url("store"))
    assert "AWS_ALLOW_HTTP" in message_of(caught)


def test_urls_are_told_from_paths(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    assert root_of(Path("s3://b/x")).location == root_of("s3://b/x/").location == "s3://b/x"
    assert isinstance(root_of("here/s3"), LocalRoot) and not is_url("C:/cache") and is_url("gs://b")
    for bad in ("ftp://host/x", "file:///tmp/x", "s3://"):
        with pytest.raises(FeatureStoreError) as caught:
            root_of(bad)
        assert "s3://bucket/prefix" in message_of(caught)
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(StoreFormatError, match=r"install the extra \[s3\]"):
        root_of(bucket.url("store"))


def test_extending_in_place_keeps_what_is_there(url: str, bucket: Bucket, small: Filled) -> None:
    before = {name: bucket.read("store", name) for name in bucket.names("store")}
    store, extra = FeatureStore.create(url, identity()), HiddenSpec(2, "bf16")
    for task in small.tasks:
        members = store.read_samples(task.id)
        store.write_bundle(task, members, features(members, [SMALL[0], extra]))
    store.publish_manifest()
    kept = lasting(before)
    assert {name: bucket.read("store", name) for name in kept} == kept
    assert CacheReader.open(url).find("hidden.L2") == extra
    assert not any(".tmp-" in name for name in bucket.mirrored()), "what was uploaded is gone from here"
