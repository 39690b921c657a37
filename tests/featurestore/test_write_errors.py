"""A disk that refuses, at each step of a write: one clear line, and nothing committed is lost."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from featurestore.errors import StoreWriteError
from featurestore.format.schema import GroupSpec, HiddenSpec, LogitsSpec
from featurestore.maintenance.merge import merge_stores
from featurestore.maintenance.verify import verify_store
from featurestore.store import FeatureStore
from tests.featurestore.helpers import features, identity, sample, task_of

SPECS: list[GroupSpec] = [LogitsSpec(5), HiddenSpec(1, "int8")]
FEW_FILES: list[GroupSpec] = [HiddenSpec(1, "bf16")]


def write_all(path: Path, specs: list[GroupSpec] = FEW_FILES) -> None:
    store = FeatureStore.create(path, identity())
    for seed in (1, 2):
        one = sample(seed, 300)
        store.add_plan([task_of([one])])
        store.write_bundle(task_of([one]), [one], features([one], specs))
    store.put_teacher_files({"config.json": b"{}"})
    store.add_provenance({"seconds": 1})
    store.publish_manifest()


def committed(path: Path) -> set[tuple[str, str]]:
    if not (path / "SPEC.json").exists():
        return set()
    return {(g, t) for g, records in FeatureStore.open(path).commits().items() for t in records}


def failing(real: Callable[..., Any], at: int, code: int) -> Callable[..., Any]:
    calls = iter(range(1, 10_000))

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == at:
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)

    return call


def check_failure(path: Path, before: set[tuple[str, str]], error: StoreWriteError, code: int) -> set[Any]:
    assert error.errno == code and os.strerror(code) in str(error) and "\n" not in str(error)
    now = committed(path)
    assert before <= now
    if now:
        problems = verify_store(path, deep=True).problems
        named = [problem.path.partition("/")[0] for problem in problems]
        assert named in ([], ["MANIFEST"], ["heads"]), "only the list may be missing"
    return now


@pytest.mark.parametrize(
    ("name", "code"), [("fsync", errno.EIO), ("link", errno.ENOSPC), ("open", errno.EACCES)]
)
def test_every_system_call_may_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    """The n-th call fails and the same request follows, for n = 1, 2, ... until it gets through."""
    real, before, failures = getattr(os, name), set[Any](), 0
    for at in range(1, 200):
        with monkeypatch.context() as patched:
            # A commit shortens the next attempt, so every third step starts afresh at a later call.
            path = tmp_path / f"store{at // 3}"
            before = committed(path)
            patched.setattr(os, name, failing(real, at, code))
            try:
                write_all(path)
            except StoreWriteError as error:
                caught = error
            else:
                break
        failures += 1
        check_failure(path, before, caught, code)
    assert failures >= 6
    write_all(path)
    assert verify_store(path, deep=True).sound


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """Python ignores SIGXFSZ, so that a write beyond the limit fails like one on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def extend(path: Path) -> None:
    """Bring one more task, a run's record and the manifest into the store."""
    store, one = FeatureStore.open(path), sample(3, 300)
    store.add_plan([task_of([one])])
    store.write_bundle(task_of([one]), [one], features([one], SPECS))
    store.add_provenance({"seconds": 2})
    store.publish_manifest()


def test_a_disk_that_is_full_at_each_write_in_turn(tmp_path: Path) -> None:
    """For every size that a new file has, the writes of that size and above break off at their last byte."""
    base = tmp_path / "base"
    write_all(base)
    whole = tmp_path / "whole"
    shutil.copytree(base, whole)
    extend(whole)
    old = {file.relative_to(base) for file in base.rglob("*")}
    new = [file for file in whole.rglob("*") if file.is_file() and file.relative_to(whole) not in old]
    sizes = sorted({file.stat().st_size for file in new})
    assert len(sizes) > 15
    before, bundles = committed(base), {p.name for p in (base / "parts").iterdir()}
    for size in sizes:
        path = tmp_path / f"store{size}"
        shutil.copytree(base, path)
        with file_size_limit(size - 1), pytest.raises(StoreWriteError) as caught:
            extend(path)
        now = check_failure(path, before, caught.value, errno.EFBIG)
        named = {r.bundle for records in FeatureStore.open(path).commits().values() for r in records.values()}
        if len(now) == len(before):
            # Nothing of the task was committed, so its bundle is gone; bundles of the rest are all there.
            assert {p.name for p in (path / "parts").iterdir()} == bundles
        assert named <= {p.name for p in (path / "parts").iterdir()}
        extend(path)
        assert verify_store(path, deep=True).sound and len(committed(path)) == len(before) + 3
        shutil.rmtree(path)


def test_an_abandoned_bundle_that_comes_back_is_deleted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After one write has failed, another thread of zarr's may make the folder anew a while later."""
    write_all(tmp_path)
    root, looks = FeatureStore.open(tmp_path).root, 0
    folder = root.begin("late")

    def late(seconds: float) -> None:
        nonlocal looks
        looks += 1
        if looks in (3, 7):
            folder.mkdir()

    monkeypatch.setattr("featurestore.storage.files.time", SimpleNamespace(sleep=late))
    root.abandon("late")
    assert looks > 7 and not folder.exists()


def test_a_marker_that_cannot_be_written_leaves_no_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_all(tmp_path)
    bundles = {path.name for path in (tmp_path / "parts").iterdir()}
    store, one = FeatureStore.open(tmp_path), sample(3, 300)
    store.add_plan([task_of([one])])
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(store, "announce", lambda _: (_ for _ in ()).throw(full))
    with pytest.raises(StoreWriteError, match="No space left"):
        store.write_bundle(task_of([one]), [one], features([one], SPECS))
    assert {path.name for path in (tmp_path / "parts").iterdir()} == bundles


def test_a_marker_that_a_merge_cannot_write_leaves_no_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_all(tmp_path / "source")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(FeatureStore, "announce", lambda *_: (_ for _ in ()).throw(full))
    with pytest.raises(StoreWriteError, match="No space left"):
        merge_stores(tmp_path / "target", [tmp_path / "source"])
    assert not list((tmp_path / "target" / "parts").iterdir())


def test_a_store_below_a_file_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreWriteError, match="Not a directory"):
        FeatureStore.create(tmp_path / "file" / "store", identity())
