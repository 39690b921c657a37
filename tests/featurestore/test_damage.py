"""Each file in turn missing, empty, cut, flipped, swapped: the audit names it, the reader raises."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from featurestore.errors import FeatureStoreError, StoreNotFoundError
from featurestore.format.schema import HiddenSpec, LogitsSpec
from featurestore.maintenance.verify import verify_store
from featurestore.reader import CacheReader
from tests.featurestore.conftest import fill

# What a reader of all features reads; the rest is for those who extend, audit or describe a store.
READ = ("SPEC.json", "MANIFEST-", "segments/", "parts/")


def read_everything(path: Path) -> None:
    reader = CacheReader.open(path)
    for i in range(len(reader)):
        reader.read(i)


def damages(data: bytes, other: bytes, chance: random.Random) -> Iterator[tuple[str, bytes | None]]:
    yield "missing", None
    yield "empty", b""
    yield "cut", data[: len(data) // 2]
    yield "grown", data + b"\0"
    if other != data:
        yield "swapped", other
    for _ in range(4):
        bit = chance.randrange(8 * len(data))
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        yield f"bit {bit} flipped", bytes(flipped)


def test_every_damage_is_named_and_never_read(tmp_path: Path) -> None:
    path = fill(
        tmp_path / "store", [LogitsSpec(4, tail=3), HiddenSpec(1, "int8")], count=2, shard_tokens=60
    ).path
    assert verify_store(path, deep=True).sound
    files = sorted(p for p in path.rglob("*") if p.is_file())
    chance, flips = random.Random(3), 0
    for i, file in enumerate(files):
        name, data = str(file.relative_to(path)), file.read_bytes()
        other = next(
            (f for f in files[i + 1 :] + files[:i] if f.name == file.name and f.read_bytes() != data),
            files[i - 1],
        )
        for what, damaged in damages(data, other.read_bytes(), chance):
            # A vanished provenance record is a loss that no other file knows of, and no number needs it; nor
            # does any need a plan all of whose tasks are listed.
            if what == "missing" and name.startswith(("provenance/", "plan-")):
                continue
            flips += what.startswith("bit")
            file.unlink()
            if damaged is not None:
                file.write_bytes(damaged)
            report = verify_store(path, deep=True)
            named = [p.path for p in report.problems]
            expected = "MANIFEST" if what == "missing" and name.startswith("MANIFEST-") else name
            assert expected in named, f"{name} {what}: {report.problems}"
            assert all(p.what and "\n" not in p.what for p in report.problems)
            if name.startswith(READ):
                with pytest.raises(FeatureStoreError):
                    read_everything(path)
            file.unlink(missing_ok=True)
            file.write_bytes(data)
    assert verify_store(path, deep=True).sound and flips >= 100
    read_everything(path)


def test_a_shallow_audit_finds_what_is_gone_or_short(tmp_path: Path) -> None:
    filled = fill(tmp_path / "store", [LogitsSpec(4)], count=3)
    shards = sorted(filled.path.glob("parts/*/*/*/c/0"))
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:-1])
    calls: list[tuple[int, int]] = []
    report = verify_store(filled.path, deep=False, progress=lambda done, total: calls.append((done, total)))
    assert sorted(p.path for p in report.problems) == [str(s.relative_to(filled.path)) for s in shards[:2]]
    done, records = [count for count, _ in calls], 2 * len(filled.tasks)
    assert done == sorted(set(done)) and calls[-1] == (records, records) and report.checked_files > 10
    assert report.to_json()["problems"][0]["what"] and report.rows == sum(t.rows for t in filled.tasks)


def test_no_store_is_no_report(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFoundError):
        verify_store(tmp_path, deep=True)
    path = fill(tmp_path / "store", [LogitsSpec(4)], count=2).path
    shutil.rmtree(path / "parts")
    assert not verify_store(path, deep=False).sound
