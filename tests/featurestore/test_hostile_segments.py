"""Segments, manifests, heads and markers that are damaged or made to harm: refused with one clear line."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from featurestore.catalogue.columns import LAYOUT, SCHEMA, from_buffer, to_bytes
from featurestore.catalogue.files import SegmentFiles
from featurestore.catalogue.folding import columns_of, finished
from featurestore.catalogue.manifest import head_names, read_head
from featurestore.catalogue.segment import check
from featurestore.errors import CorruptionError, FeatureStoreError, StoreFormatError
from featurestore.format.schema import HiddenSpec, LogitsSpec
from featurestore.identity import digest, seal
from featurestore.maintenance.verify import verify_store
from featurestore.reader import CacheReader
from featurestore.storage.local import LocalRoot
from featurestore.store import FeatureStore
from tests.featurestore.conftest import Filled, copy_of, fill
from tests.featurestore.helpers import sample, task_of
from tests.featurestore.test_hostile import reseal
from tests.featurestore.test_segments import SPECS, listed

Columns = dict[str, Any]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Filled:
    specs = [LogitsSpec(4, tail=3), HiddenSpec(1, "int8")]
    return fill(tmp_path_factory.mktemp("sound") / "store", specs, count=4, shard_tokens=60)


@pytest.fixture
def victim(sound: Filled, tmp_path: Path) -> Filled:
    return copy_of(sound, tmp_path / "store")


def relisted(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest, with a valid seal, name and head, as an attacker can."""
    (manifest,) = path.glob("MANIFEST-*")
    (head,) = (path / "heads").iterdir()
    reseal(manifest, edit)
    name = digest(manifest.read_bytes())
    manifest.rename(path / f"MANIFEST-{name}.json")
    head.unlink()
    records = sum(
        totals["tasks"]
        for totals in json.loads((path / f"MANIFEST-{name}.json").read_text())["totals"].values()
    )
    (path / "heads" / f"{records:012d}-000001-{name}").write_text(f"{name}\n")


def resegmented(path: Path, data: bytes) -> None:
    """Put another segment in the place of the only one."""
    (old,) = (path / "segments").iterdir()
    old.unlink()
    (path / "segments" / f"{digest(data)}.arrow").write_bytes(data)
    relisted(path, lambda record: record["segments"][0].update(digest=digest(data), bytes=len(data)))


def refused(path: Path) -> str:
    """The one line with which a reader refuses the store; an audit finds something, too."""
    with pytest.raises(FeatureStoreError) as caught:
        reader = CacheReader.open(path)
        for index in range(len(reader)):
            reader.read(index)
        reader.documents()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    assert not verify_store(path, deep=True).sound
    return message


def put(name: str, place: int, value: object) -> Callable[[Columns], None]:
    def edit(columns: Columns) -> None:
        columns[name] = columns[name].copy()
        columns[name][place] = value

    return edit


def cut(name: str) -> Callable[[Columns], None]:
    return lambda columns: columns.update({name: columns[name][:-1]})


EDITS: dict[str, Callable[[Columns], None]] = {
    **{f"{name} cut": cut(name) for name in LAYOUT if name not in ("dropped", "plan", "document")},
    **{f"{name} overflows": put(name, 1, 2**63 - 1) for name in LAYOUT if name.endswith("_start")},
    **{f"{name} negative": put(name, 1, -1) for name in LAYOUT if name.endswith("_start")},
    "length 0": put("length", 0, 0),
    "length negative": put("length", 0, -5),
    "length of a giant": put("length", 0, 2**31 - 1),
    "size 0": put("file_size", 0, 0),
    "size of a giant": put("file_size", 0, 2**62),
    "stat nan": put("stat", 0, np.nan),
    "stat inf": put("stat", 0, np.inf),
    "stat no count": put("stat", 0, -7.0),
    "group unknown": put("record_group", 0, 77),
    "group negative": put("record_group", 0, -1),
    "group twice": lambda columns: columns.update(record_group=np.zeros_like(columns["record_group"])),
    "group path": put("group", 0, np.frombuffer(b"../../etc/passwd".ljust(32, b"\0"), np.uint8)),
    "sample of another": put("sample", 0, np.uint8(7)),
    "task of another": put("task", 0, np.uint8(7)),
    "key place": put("key_place", 0, -1),
    "key place far": put("key_place", 0, 2**31 - 1),
    "keys descend": lambda columns: columns.update(key=columns["key"][::-1].copy()),
    "dropped far": lambda columns: columns.update(dropped=np.array([10**6], np.int32)),
    "dropped negative": lambda columns: columns.update(dropped=np.array([-1], np.int32)),
    "dropped twice": lambda columns: columns.update(dropped=np.array([1, 1], np.int32)),
    "dropped unsaid": lambda columns: columns.update(dropped=np.array([1], np.int32)),
    "hash of another": put("file_hash", 0, np.uint8(7)),
    "bundle of nobody": put("record_bundle", 0, np.uint8(7)),
}


@pytest.mark.parametrize("name", EDITS)
def test_columns_that_no_writer_makes(victim: Filled, name: str) -> None:
    (file,) = (victim.path / "segments").iterdir()
    columns = {key: value.copy() for key, value in from_buffer(file.read_bytes(), "here").items()}
    EDITS[name](columns)
    resegmented(victim.path, to_bytes(columns))
    refused(victim.path)


@pytest.mark.parametrize(
    "edit",
    [
        lambda r: r.update(segments=[]),
        lambda r: r.update(segments={}),
        lambda r: r.update(segments=[*r["segments"], *r["segments"]]),
        lambda r: r["segments"][0].update(digest="../../../../etc/passwd"),
        lambda r: r["segments"][0].update(bytes=2**60),
        lambda r: r["segments"][0].update(bytes=True),
        lambda r: r["segments"][0].update(samples=-1),
        lambda r: r["segments"][0].update(samples=2**60),
        lambda r: r["segments"][0].update(tasks=0),
        lambda r: r["segments"][0].update(longest=0),
        lambda r: r["segments"][0].update(longest=2),
        lambda r: r["segments"][0].update(rows=1),
        lambda r: r["segments"][0].update(held=[["logits-00000000"]]),
        lambda r: r["segments"][0].update(held=[]),
        lambda r: r.update(totals={}),
        lambda r: r.update(lengths={"99": 1}),
        lambda r: r.update(runs={"x": {}}),
        lambda r: r.update(groups={}),
        lambda r: r.update(teacher=["../x"]),
        lambda r: r.update(spec="0" * 32),
        lambda r: r.update(version=3),
    ],
)
def test_manifests_that_no_writer_makes(victim: Filled, edit: Callable[[dict[str, Any]], object]) -> None:
    (manifest,) = victim.path.glob("MANIFEST-*")
    (head,) = (victim.path / "heads").iterdir()
    reseal(manifest, edit)
    name = digest(manifest.read_bytes())
    manifest.rename(victim.path / f"MANIFEST-{name}.json")
    head.rename(head.with_name(f"{head.name[:20]}{name}"))
    refused(victim.path)


def test_a_head_that_claims_more_is_refused(victim: Filled) -> None:
    (head,) = (victim.path / "heads").iterdir()
    head.rename(head.with_name("9" * 12 + head.name[12:]))
    assert "lists something else" in refused(victim.path)


def test_a_compressed_segment_is_not_unpacked(victim: Filled) -> None:
    """It would take a gigabyte for a file of some kilobytes."""
    (file,) = (victim.path / "segments").iterdir()
    columns = dict(from_buffer(file.read_bytes(), "here"))
    plain = pa.ipc.open_file(to_bytes(columns)).read_all()
    zeros = pa.array([np.zeros(2**24, np.int64)], SCHEMA.field("file_start").type)
    place = SCHEMA.get_field_index("file_start")
    bomb = plain.set_column(place, SCHEMA.field("file_start"), zeros)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, SCHEMA, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(bomb)
    data = bytes(sink.getvalue())
    assert len(data) < 2**20
    before = pa.total_allocated_bytes()
    del plain, bomb, zeros
    with pytest.raises(CorruptionError, match="here: not readable as Arrow IPC: a compressed batch"):
        from_buffer(data, "here")
    assert pa.total_allocated_bytes() <= before
    resegmented(victim.path, data)
    refused(victim.path)


def test_no_bytes_make_a_segment_but_its_own() -> None:
    """Of any change to a file `from_buffer` and `check` make a CorruptionError or a segment, nothing else."""
    data = to_bytes(finished(columns_of([listed(n) for n in range(0, 40, 3)])))
    chance, refusals = random.Random(5), 0
    for trial in range(1500):
        changed = bytearray(data)
        for _ in range(chance.choice((1, 1, 1, 4))):
            # The descriptions of the file lie at both of its ends.
            place = chance.choice(
                (chance.randrange(len(data)), chance.randrange(4096), -1 - chance.randrange(4096))
            )
            changed[place] = (
                chance.randrange(256) if trial % 2 else changed[place] ^ (1 << chance.randrange(8))
            )
        cut_off = bytes(changed[: chance.randrange(len(data))]) if trial % 10 == 0 else bytes(changed)
        try:
            check(from_buffer(cut_off, "here"), SPECS, "here")
        except CorruptionError as error:
            refusals += 1
            assert "\n" not in str(error)
    assert refusals > 500


def test_every_flipped_bit_is_noticed(victim: Filled) -> None:
    root = LocalRoot(victim.path)
    head = read_head(root, head_names(root)[-1])
    file = victim.path / head.segments[0].name
    data, chance = file.read_bytes(), random.Random(3)
    for _ in range(300):
        bit = chance.randrange(8 * len(data))
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        with pytest.raises(CorruptionError, match="does not hash to its name"):
            SegmentFiles(root, head.segments, head.groups).checked(0)
    file.write_bytes(data[:-1])
    with pytest.raises(CorruptionError):
        SegmentFiles(root, head.segments, head.groups).glance(0)
    file.unlink()
    with pytest.raises(CorruptionError, match=r"missing|No such file"):
        SegmentFiles(root, head.segments, head.groups).glance(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bundle": "0" * 16 + "-" + "0" * 12}, "another bundle"),
        ({"lengths": [5, 6]}, "do not hash|lengths|one length"),
        ({"samples": ["../x", "y"]}, "invalid name"),
        ({"groups": ["../../x"]}, "invalid name"),
        ({"groups": "samples"}, "needs groups"),
        ({"samples": None}, "needs groups"),
    ],
)
def test_markers_that_no_writer_makes(victim: Filled, change: dict[str, Any], message: str) -> None:
    members = [sample(70, 4), sample(71, 9)]
    victim.store.prepare_bundle(task_of(members), members, {})
    (marker,) = (victim.path / "pending").iterdir()
    reseal(marker, lambda record: record.update(change))
    with pytest.raises((CorruptionError, StoreFormatError), match=message):
        FeatureStore.open(victim.path).publish_manifest()
    assert not verify_store(victim.path, deep=True).sound
    marker.write_bytes(seal({"format": "distily-cache/pending", "version": 1}))
    with pytest.raises(FeatureStoreError):
        FeatureStore.open(victim.path).publish_manifest()
    # Readers look at no marker.
    assert len(CacheReader.open(victim.path)) == 4
