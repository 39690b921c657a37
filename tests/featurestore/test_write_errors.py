"""A disk that refuses, at each step of a write: one clear line, and nothing committed is lost."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from featurestore.errors import StoreWriteError
from featurestore.schema import GroupSpec, HiddenSpec, LogitsSpec
from featurestore.store import FeatureStore
from featurestore.verify import verify_store
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
        assert [p.path for p in problems] in ([], ["MANIFEST"]), "only the list may be missing"
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


@pytest.mark.parametrize("limit", [200, 700, 1500, 3000])
def test_a_write_that_breaks_off_leaves_no_bundle_behind(tmp_path: Path, limit: int) -> None:
    path, one = tmp_path / "store", sample(3, 300)
    write_all(path)
    before, bundles = committed(path), sorted((path / "parts").iterdir())
    store, task = FeatureStore.open(path), task_of([one])
    store.add_plan([task])
    with file_size_limit(limit), pytest.raises(StoreWriteError) as caught:
        store.write_bundle(task, [one], features([one], SPECS))
    check_failure(path, before, caught.value, errno.EFBIG)
    assert sorted((path / "parts").iterdir()) == bundles and committed(path) == before
    store.write_bundle(task, [one], features([one], SPECS))
    store.publish_manifest()
    assert verify_store(path, deep=True).sound


def test_a_store_below_a_file_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreWriteError, match="Not a directory"):
        FeatureStore.create(tmp_path / "file" / "store", identity())
