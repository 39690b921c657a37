"""Stores made to harm: refused with one clear line, in little memory, and no path outside is touched.

The manifests here are of version 1; `test_hostile_segments` has those of version 2.
"""

from __future__ import annotations

import io
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr

from featurestore.errors import CorruptionError, FeatureStoreError, StoreFormatError
from featurestore.format.arrays import write_group
from featurestore.format.columns import Extent
from featurestore.format.kinds.hidden import HiddenKind
from featurestore.format.schema import HiddenSpec, LogitsSpec, group_id
from featurestore.format.states.rotated import RotatedLayout
from featurestore.format.tables import SAMPLE_SCHEMA
from featurestore.identity import digest, seal
from featurestore.maintenance.verify import verify_store
from featurestore.reader import CacheReader
from featurestore.storage.files import hash_file
from featurestore.store import FeatureStore
from tests.featurestore.conftest import Filled, copy_of, fill
from tests.featurestore.version1 import as_version_1

LOGITS, HIDDEN = LogitsSpec(4, tail=3), HiddenSpec(1, "int8")
Edit = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Filled:
    made = fill(tmp_path_factory.mktemp("sound") / "store", [LOGITS, HIDDEN], count=3, shard_tokens=1000)
    as_version_1(made.path)
    return made


@pytest.fixture
def victim(sound: Filled, tmp_path: Path) -> Filled:
    return copy_of(sound, tmp_path / "store")


def reseal(path: Path, edit: Edit) -> None:
    """Change a record and give it a valid seal, as an attacker can."""
    record = json.loads(path.read_bytes())
    del record["blake3"]
    edit(record)
    path.write_bytes(seal(record))


def relist(victim: Filled, edit: Edit = lambda r: None) -> None:
    """Make the manifest agree with the records and SPEC.json as they are now, then change it."""
    path = next(victim.path.glob("MANIFEST-*"))

    def update(record: dict[str, Any]) -> None:
        record["spec"] = digest((victim.path / "SPEC.json").read_bytes())
        for task, groups in record["tasks"].items():
            for group in groups:
                groups[group] = digest((victim.path / "commit" / group / f"{task}.json").read_bytes())
        edit(record)

    reseal(path, update)
    path.rename(victim.path / f"MANIFEST-{digest(path.read_bytes())}.json")


def restamp(victim: Filled, file: Path) -> None:
    """Make the commit record and the manifest agree with a changed data file."""
    bundle = next(p for p in file.parents if p.parent.name == "parts")
    name = str(file.relative_to(bundle))
    for commit in victim.path.glob("commit/*/*.json"):
        if name in json.loads(commit.read_bytes())["files"]:
            stamp = list(hash_file(file))
            reseal(commit, lambda r, stamp=stamp: r["files"].update({name: stamp}))  # type: ignore[misc]
    relist(victim)


def refused(victim: Filled, kind: type[FeatureStoreError] = FeatureStoreError) -> str:
    """Reader and audit both refuse, in one line each and with bounded memory; returns the reader's line."""
    tracemalloc.start()
    with pytest.raises(kind) as caught:
        reader = CacheReader.open(victim.path)
        for i in range(len(reader)):
            reader.read(i)
    problems = verify_store(victim.path, deep=True).problems
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert problems and all("\n" not in p.what for p in problems)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert peak < 50 * 2**20
    return str(caught.value)


@pytest.mark.parametrize(
    "edit",
    [
        lambda r: r.update(bundle="../../../../etc"),
        lambda r: r.update(bundle="/etc"),
        lambda r: r.update(bundle="0" * 16 + "-" + "0" * 12),
        lambda r: r.update(bundle=["x"]),
        lambda r: r["files"].update({"../../../etc/passwd": [1, "0" * 16]}),
        lambda r: r.update(files={"/etc/passwd": [1, "0" * 16]}),
        lambda r: r["files"].update({next(iter(r["files"])): [-1, "0" * 16]}),
        lambda r: r["files"].update({next(iter(r["files"])): [1, "../x"]}),
        lambda r: r["files"].update({next(iter(r["files"])): 3}),
        lambda r: r.update(files=[]),
        lambda r: r.update(rows=2**40),
        lambda r: r.update(rows=True),
        lambda r: r.update(samples=0),
        lambda r: r.update(rows=r["rows"] + 1),
        lambda r: r["stats"].update(entries=2**60),
        lambda r: r["stats"].update(head_mass="much"),
        lambda r: r["stats"].update(entropy=10**400),
        lambda r: r.update(stats={}),
        lambda r: r["spec"].update(top_k=10**30),
        lambda r: r.update(spec={"kind": "hidden", "layer": 10**9, "dtype": "bf16"}),
        lambda r: r.update(spec={"kind": "logits", "top_k": 3}),
        lambda r: r.update(version=2),
        lambda r: r.update(version="1"),
        lambda r: r.update(format="something-else"),
    ],
)
def test_hostile_commit_records(victim: Filled, edit: Edit) -> None:
    for commit in (victim.path / "commit" / group_id(LOGITS)).iterdir():
        reseal(commit, edit)
    relist(victim)
    refused(victim)


@pytest.mark.parametrize(
    "edit",
    [
        lambda r: r.update(plans=["../../secret.parquet"]),
        lambda r: r.update(plans="plan"),
        lambda r: r.update(teacher=["/etc/passwd"]),
        lambda r: r.update(plans=[]),
        lambda r: r.update(groups={"../x": {"kind": "logits", "top_k": 3}}),
        lambda r: r.update(tasks={"../../x": {"samples": "0" * 32}}),
        lambda r: r.update(tasks={"0" * 16: {"samples": "0" * 32}}),
        lambda r: r.update(tasks={"0" * 16: {"logits-12345678": "0" * 32, "samples": "0" * 32}}),
        lambda r: r.update(tasks={"0" * 16: []}),
        lambda r: r.update(spec="0" * 32),
        lambda r: r.update(stats=[1]),
        lambda r: r.update(stats={"logits-12345678": {"entries": 1}}),
        lambda r: r["stats"].update({name: {"entries": "many"} for name in r["stats"]}),
        lambda r: r["stats"].update({name: {"entries": 10**400} for name in r["stats"]}),
        lambda r: r.update(version=2),
    ],
)
def test_hostile_manifests(victim: Filled, edit: Edit) -> None:
    relist(victim, edit)
    refused(victim)


@pytest.mark.parametrize(
    "stats",
    [
        {"squared_error": 1.0},
        {"squared_error": -1.0, "squared_norm": 2.0},
        {"squared_error": 0, "entries": 3},
    ],
)
def test_hostile_errors_of_hidden_states(victim: Filled, stats: dict[str, float]) -> None:
    for commit in (victim.path / "commit" / group_id(HIDDEN)).iterdir():
        reseal(commit, lambda r: r.update(stats=stats))
    relist(victim)
    refused(victim, StoreFormatError)


def test_a_future_version_says_so(victim: Filled) -> None:
    reseal(victim.path / "SPEC.json", lambda r: r.update(version=2))
    with pytest.raises(StoreFormatError, match=r"version 2.*upgrade"):
        FeatureStore.open(victim.path)


@pytest.mark.parametrize(
    "edit",
    [
        lambda r: r["teacher"].update(hidden_size=2**31 - 1),
        lambda r: r["teacher"].update(vocab_size=0),
        lambda r: r["teacher"].update(vocab_size=2**80),
        lambda r: r["teacher"].pop("engine"),
        lambda r: r.update(teacher=None),
    ],
)
def test_hostile_identities(victim: Filled, edit: Edit) -> None:
    reseal(victim.path / "SPEC.json", edit)
    relist(victim)
    refused(victim, StoreFormatError)


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m.update(shape=[2**40]),
        lambda m: m.update(data_type="float64"),
        lambda m: m["codecs"][0]["configuration"].update(chunk_shape=[2**40]),
        lambda m: m["codecs"][0]["configuration"].update(chunk_shape=[0]),
        lambda m: m["codecs"][0]["configuration"]["codecs"].insert(0, {"name": "pickle"}),
        lambda m: m["codecs"][0]["configuration"]["codecs"].pop(),
        lambda m: m.update(codecs=[]),
        lambda m: m.update(zarr_format=2),
        lambda m: m.clear(),
    ],
)
def test_hostile_array_metadata(victim: Filled, edit: Edit) -> None:
    file = next(victim.path.glob(f"parts/*/{group_id(LOGITS)}/lse/zarr.json"))
    meta = json.loads(file.read_text())
    edit(meta)
    file.write_text(json.dumps(meta))
    restamp(victim, file)
    assert "lse/zarr.json" in refused(victim, StoreFormatError)


def shard_of(body: bytes, offset: int = 0) -> bytes:
    """A shard of one inner chunk with valid checksums."""
    chunk = body + google_crc32c.value(body).to_bytes(4, "little")
    index = np.array([offset, len(chunk)], "<u8").tobytes()
    return chunk + index + google_crc32c.value(index).to_bytes(4, "little")


@pytest.mark.parametrize("name", ["lse", "head_index", "vocabulary", "tail_index"])
@pytest.mark.parametrize(
    "shard",
    [
        # blosc: version, flags, type size, then unpacked size 2 GiB - 1, block size, packed size
        shard_of(bytes([2, 1, 0x91, 4]) + np.array([2**31 - 1, 2**20, 24], "<u4").tobytes() + bytes(8)),
        shard_of(b"\x00" * 40),
        shard_of(b"\xff" * 8),
        shard_of(b"x" * 40, offset=2**63),
        shard_of(b"x" * 40, offset=30),
        b"\xff" * 16 + google_crc32c.value(b"\xff" * 16).to_bytes(4, "little"),
        b"x",
    ],
    ids=["bomb", "zeros", "short", "overflow", "overrun", "absent", "stub"],
)
def test_bombs_and_broken_shards(victim: Filled, name: str, shard: bytes) -> None:
    shards = victim.path.glob(f"parts/*/{group_id(LOGITS)}/{name}/c/**/0")
    file = next(path for path in shards if path.is_file())
    file.write_bytes(shard)
    restamp(victim, file)
    assert f"{name}/c/0" in refused(victim, CorruptionError)


@pytest.mark.parametrize("name", ["head_index", "tail_index", "vocabulary"])
def test_ids_that_no_token_has(victim: Filled, name: str) -> None:
    folder = next(victim.path.glob(f"parts/*/{group_id(LOGITS)}"))
    zarr.open_group(str(folder), mode="r+")[name][...] = 60_000
    shard = next(path for path in (folder / name / "c").rglob("0") if path.is_file())
    restamp(victim, shard)
    assert name in refused(victim, CorruptionError)


def test_samples_that_unpack_to_gigabytes(victim: Filled) -> None:
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, SAMPLE_SCHEMA, compression="zstd") as writer:
        tokens = pa.array([np.zeros(2**20, np.int32)], pa.list_(pa.int32()))
        mask = pa.array([np.zeros(2**20, bool)], pa.list_(pa.bool_()))
        row = pa.table([["0" * 32], pa.array([2**20], pa.int32()), tokens, mask], schema=SAMPLE_SCHEMA)
        for _ in range(8):
            writer.write_table(row)
    file = next(victim.path.glob("parts/*/samples.parquet"))
    file.write_bytes(sink.getvalue())
    restamp(victim, file)
    refused(victim, CorruptionError)


def test_a_record_that_is_nested_too_deep_or_a_pipe(victim: Filled) -> None:
    commit = next((victim.path / "commit" / "samples").iterdir())
    commit.write_bytes(b"[" * 100_000)
    refused(victim, CorruptionError)
    commit.unlink()
    os.mkfifo(commit)
    assert "not a regular file" in refused(victim, CorruptionError)


@pytest.mark.parametrize("dtype", ["int4", "int2"])
def test_an_outlier_in_no_column(tmp_path: Path, dtype: str) -> None:
    """A GPU would write somewhere else."""
    spec, kind = HiddenSpec(1, dtype), HiddenKind()
    extent = Extent(rows=2, samples=1, entries=0, distinct_ids=0, vocab_size=9, hidden_size=200)
    rows = np.full((2, RotatedLayout(dtype, 200).row_bytes), 0xFF, np.uint8)
    write_group(tmp_path / "group", {}, kind.layouts(spec, extent), {"values": rows})
    with pytest.raises(CorruptionError, match="outlier beyond the hidden size 200"):
        kind.open(spec, tmp_path / "group", extent, None)(0, 0, 2)
