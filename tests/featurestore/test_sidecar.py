"""The teacher's sidecar as files: what is written is read, other tools read it too, and damage is refused."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load

from featurestore.errors import FeatureStoreError, MissingFeatureError
from featurestore.format.schema import LogitsSpec
from featurestore.format.sidecar import BlockSpec, HeadSpec, Part, PartSpec, Tensor, part_file, read_part
from featurestore.identity import digest, header, seal
from featurestore.maintenance.info import store_info
from featurestore.maintenance.merge import merge_stores
from featurestore.maintenance.verify import verify_store
from featurestore.reader import CacheReader
from featurestore.store import FeatureStore
from tests.featurestore.conftest import Filled, Place, copy_of, fill
from tests.featurestore.helpers import HIDDEN, LAYERS, VOCAB, identity
from tests.featurestore.test_damage import damages
from tests.s3 import Bucket

NUMPY = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16}
TORCH = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
HEAD = HeadSpec(vocab_size=VOCAB, hidden_size=HIDDEN, norm_eps=1e-6, logit_scale=0.25, logit_softcap=30.0)
BLOCK = BlockSpec(
    layer=2,
    hidden_size=HIDDEN,
    heads=4,
    kv_heads=2,
    head_dim=6,
    norm_eps=1e-5,
    attention_scale=0.4,
    attention_softcap=None,
    window=7,
    rope={"rope_type": "default", "rope_theta": 500.0},
)


def weights(spec: PartSpec, dtypes: str = "bf16", optional: bool = True, seed: int = 0) -> dict[str, Tensor]:
    """Random bits of every kind but NaN and infinity; types by turns when several are named."""
    chance, kinds = np.random.default_rng(seed), dtypes.split()
    shapes = spec.required() | (spec.optional() if optional else {})
    found = {}
    for i, (name, shape) in enumerate(shapes.items()):
        kind = kinds[i % len(kinds)]
        values = chance.standard_normal(shape).astype(np.float32)
        given = values.view(np.uint32) >> 16 if kind == "bf16" else values
        found[name] = Tensor(kind, given.astype(NUMPY[kind]))
    return found


def add(store: FeatureStore, spec: PartSpec, seed: int = 0) -> str:
    name, data = part_file(spec, weights(spec, "bf16 f32", seed=seed))
    store.put_teacher_files({name: data})
    return name


def same(part: Part[Any], spec: PartSpec, expected: dict[str, Tensor]) -> None:
    assert part.spec == spec and set(part.tensors) == set(expected)
    for name, tensor in expected.items():
        assert part.tensors[name].dtype == tensor.dtype
        np.testing.assert_array_equal(part.tensors[name].values, tensor.values, strict=True)


@given(
    head=st.builds(
        HeadSpec,
        vocab_size=st.integers(1, 40),
        hidden_size=st.integers(1, 9),
        norm_eps=st.just(0.0),
        logit_scale=st.floats(0.01, 9),
    ),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    head_dim=st.integers(1, 7),
    dtypes=st.sampled_from(["f32", "f16", "bf16", "bf16 f32", "f16 f32 bf16"]),
    optional=st.booleans(),
)
def test_what_is_written_is_read_here_and_elsewhere(
    tmp_path_factory: pytest.TempPathFactory,
    head: HeadSpec,
    kv_heads: int,
    group: int,
    head_dim: int,
    dtypes: str,
    optional: bool,
) -> None:
    folder = tmp_path_factory.mktemp("parts")
    block = replace(
        BLOCK, hidden_size=head.hidden_size, heads=kv_heads * group, kv_heads=kv_heads, head_dim=head_dim
    )
    teacher = identity(hidden_size=head.hidden_size, vocab_size=head.vocab_size)
    for spec in (head, block):
        expected = weights(spec, dtypes, optional)
        name, data = part_file(spec, expected)
        (folder / name).write_bytes(data)
        same(read_part(folder / name, "part", name, teacher), spec, expected)
        for key, tensor in load(data).items():
            assert tensor.dtype == TORCH[expected[key].dtype]
            assert torch.equal(tensor.float(), torch.from_numpy(expected[key].to_float32()))


def test_the_bytes_of_version_1_stay_as_they_are() -> None:
    """Two writers of one teacher have to make one file; a store of before has to stay readable."""

    def counted(spec: PartSpec, kind: str) -> dict[str, Tensor]:
        shapes = spec.required() | spec.optional()
        return {
            name: Tensor(kind, np.arange(math.prod(shape), dtype=NUMPY[kind]).reshape(shape))
            for name, shape in shapes.items()
        }

    head, block = (
        HeadSpec(vocab_size=3, hidden_size=2, norm_eps=1e-6),
        replace(BLOCK, hidden_size=2, heads=2, kv_heads=1, head_dim=2),
    )
    assert part_file(head, counted(head, "f32"))[0] == "head-8ca60311d71af52d67189562d704bb42.safetensors"
    assert (
        part_file(block, counted(block, "bf16"))[0] == "block2-08258654647d4bb4bdbc6887fecd2edc.safetensors"
    )


def test_other_tensors_than_the_spec_has_are_not_written() -> None:
    sound = weights(BLOCK)
    short = {"q.weight": Tensor("bf16", np.zeros((3, HIDDEN), np.uint16))}
    for wrong in (sound | short, sound | {"extra": sound["q.bias"]}, {"q.weight": sound["q.weight"]}):
        with pytest.raises(ValueError, match=r"tensors|weight"):
            part_file(BLOCK, wrong)


@pytest.mark.parametrize(
    "change",
    [
        {"heads": 3},
        {"norm_eps": -1e-6},
        {"attention_scale": 0},
        {"attention_scale": True},
        {"attention_scale": 10**400},
        {"attention_softcap": 0.0},
        {"window": 0},
        {"rope": [1]},
        {"head_dim": 2.0},
        {"layer": -1},
    ],
)
def test_specs_are_checked(change: dict[str, Any]) -> None:
    with pytest.raises(FeatureStoreError):
        replace(BLOCK, **change)


def test_parts_are_read_wherever_the_store_lies(filled_anywhere: Filled, place: Place) -> None:
    store = filled_anywhere.store
    old = store.publish_manifest()
    names = [add(store, HEAD), add(store, BLOCK)]
    new = store.publish_manifest()
    assert new.records == old.records and new.digest != old.digest
    if place.bucket is not None:
        # What the writer read back; the reader may be another machine.
        shutil.rmtree(place.bucket.mirrors)
    reader = CacheReader.open(filled_anywhere.path)
    assert reader.manifest_digest == new.digest, (
        "the manifest that lists more of the teacher is the newer one"
    )
    # Config and tokenizer are had without downloading weights.
    assert (reader.teacher_dir / "config.json").read_bytes() == b"{}"
    assert place.bucket is None or not any(name.endswith(".safetensors") for name in place.bucket.mirrored())
    sidecar = reader.sidecar()
    assert sidecar.parts == ["head", "block2"]
    same(sidecar.head(), HEAD, weights(HEAD, "bf16 f32"))
    same(sidecar.block(2), BLOCK, weights(BLOCK, "bf16 f32"))
    assert sidecar.block(2) is sidecar.block(2)
    info = store_info(filled_anywhere.path)
    on_disk = place.contents("store")
    assert info.sidecar == {
        part: len(on_disk[f"teacher/{name}"][1]) for part, name in zip(sidecar.parts, names, strict=True)
    }
    assert verify_store(filled_anywhere.path, deep=True).sound

    before = CacheReader.open(filled_anywhere.path, old.digest).sidecar()
    assert before.parts == []
    with pytest.raises(MissingFeatureError, match=r"it has: nothing\).*--final`$"):
        before.head()
    with pytest.raises(MissingFeatureError, match=r"it has: head, block2\).*--relation-layers 3`$"):
        sidecar.block(3)


def test_a_broken_copy_is_fetched_again(url: str, bucket: Bucket) -> None:
    store = FeatureStore.open(url)
    add(store, HEAD)
    store.publish_manifest()
    CacheReader.open(url).sidecar().head()
    (copy,) = bucket.mirrors.rglob("head-*.safetensors")
    sound = copy.read_bytes()
    copy.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    same(CacheReader.open(url).sidecar().head(), HEAD, weights(HEAD, "bf16 f32"))
    assert copy.read_bytes() == sound


def test_every_damage_is_named_and_refused(tmp_path: Path) -> None:
    filled = fill(tmp_path / "store", [LogitsSpec(4)], count=2)
    names = [add(filled.store, HEAD), add(filled.store, BLOCK)]
    filled.store.publish_manifest()
    chance, flips = random.Random(5), 0
    folder = filled.path / "teacher"
    for name, other in (names, reversed(names)):
        data = (folder / name).read_bytes()
        for _ in range(8):
            for what, damaged in damages(data, (folder / other).read_bytes(), chance):
                flips += what.startswith("bit")
                (folder / name).unlink()
                if damaged is not None:
                    (folder / name).write_bytes(damaged)
                (problem,) = verify_store(filled.path, deep=True).problems
                assert problem.path == f"teacher/{name}" and "\n" not in problem.what
                if not what.startswith(("bit", "swapped")):
                    (problem,) = verify_store(filled.path, deep=False).problems
                    assert problem.path == f"teacher/{name}"
                sidecar = CacheReader.open(filled.path).sidecar()
                with pytest.raises(FeatureStoreError, match=name):
                    sidecar.head() if name.startswith("head") else sidecar.block(2)
                (folder / name).unlink(missing_ok=True)
                (folder / name).write_bytes(data)
    assert flips == 64 and verify_store(filled.path, deep=True).sound


def forge(spec: PartSpec, edit: Callable[[dict[str, Any], dict[str, Any]], object]) -> bytes:
    """A part whose header and sealed spec an attacker has changed, with a valid seal."""
    _, data = part_file(spec, weights(spec))
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    kind = "head" if isinstance(spec, HeadSpec) else "block"
    record = {**header("sidecar"), "kind": kind, "spec": asdict(spec)}
    edit(entries, record)
    if "__metadata__" in entries:
        entries["__metadata__"] = {"distily-cache": seal(record).decode()}
    head = json.dumps(entries).encode()
    return len(head).to_bytes(8, "little") + head + data[8 + length :]


FORGERIES: dict[str, bytes] = {
    "nothing": b"",
    "short": b"\1\0\0",
    "no JSON": (9).to_bytes(8, "little") + b"not json!",
    "a list": (2).to_bytes(8, "little") + b"[]",
    "nested": (100_000).to_bytes(8, "little") + b"[" * 100_000,
    "a header of a petabyte": (2**50).to_bytes(8, "little") + b"{}",
    "no metadata": forge(HEAD, lambda e, r: e.pop("__metadata__")),
    "a later version": forge(HEAD, lambda e, r: r.update(version=2)),
    "another record": forge(HEAD, lambda e, r: r.update(format="distily-cache/commit")),
    "an unknown kind": forge(HEAD, lambda e, r: r.update(kind="tail")),
    "another kind": forge(HEAD, lambda e, r: r.update(kind="block")),
    "a spec of a list": forge(HEAD, lambda e, r: r.update(spec=[])),
    "a spec that lacks a field": forge(HEAD, lambda e, r: r["spec"].pop("logit_scale")),
    "a negative scale": forge(HEAD, lambda e, r: r["spec"].update(logit_scale=-1.0)),
    "text for a number": forge(HEAD, lambda e, r: r["spec"].update(norm_eps="1e-6")),
    "another vocabulary": forge(HEAD, lambda e, r: r["spec"].update(vocab_size=VOCAB + 1)),
    "another width": forge(HEAD, lambda e, r: r["spec"].update(hidden_size=HIDDEN - 1)),
    "a block": forge(BLOCK, lambda e, r: None),
    "an unknown type": forge(HEAD, lambda e, r: e["weight"].update(dtype="I64")),
    "a wider type": forge(HEAD, lambda e, r: e["weight"].update(dtype="F32")),
    "another shape": forge(HEAD, lambda e, r: e["weight"].update(shape=[HIDDEN, VOCAB])),
    "overlapping tensors": forge(HEAD, lambda e, r: e["weight"].update(data_offsets=[0, 2 * VOCAB * HIDDEN])),
    "offsets behind the end": forge(HEAD, lambda e, r: e["bias"].update(data_offsets=[2**40, 2**40 + 4])),
    "an extra tensor": forge(HEAD, lambda e, r: e.update(x=e["bias"])),
    "a missing tensor": forge(HEAD, lambda e, r: e.pop("weight")),
    "an entry of text": forge(HEAD, lambda e, r: e.update(bias="x")),
    "more bytes": forge(HEAD, lambda e, r: None) + b"\0",
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Filled:
    return fill(tmp_path_factory.mktemp("plain") / "store", [LogitsSpec(4)], count=2)


@pytest.mark.parametrize("what", FORGERIES)
def test_forged_parts_are_refused(what: str, plain: Filled, tmp_path: Path) -> None:
    """Their hash is the listed one: only what they say is wrong."""
    filled = copy_of(plain, tmp_path / "store")
    name = f"head-{digest(FORGERIES[what])}.safetensors"
    filled.store.put_teacher_files({name: FORGERIES[what]})
    filled.store.publish_manifest()
    with pytest.raises(FeatureStoreError, match=name) as refused:
        CacheReader.open(filled.path).sidecar().head()
    assert "\n" not in str(refused.value)
    assert [problem.path for problem in verify_store(filled.path, deep=True).problems] == [f"teacher/{name}"]


def test_a_sound_forgery_is_a_part(plain: Filled, tmp_path: Path) -> None:
    """So it is the edits above that are refused; and a field that a later writer adds is ignored."""
    filled = copy_of(plain, tmp_path / "store")
    data = forge(HEAD, lambda e, r: r["spec"].update(new_field=3))
    filled.store.put_teacher_files({f"head-{digest(data)}.safetensors": data})
    filled.store.publish_manifest()
    same(CacheReader.open(filled.path).sidecar().head(), HEAD, weights(HEAD))


def test_merging_brings_the_parts(plain: Filled, tmp_path: Path) -> None:
    one, two = copy_of(plain, tmp_path / "one"), copy_of(plain, tmp_path / "two")
    add(one.store, HEAD)
    name = add(two.store, BLOCK)
    # What another version of this package might have written of the same head.
    add(two.store, HEAD, seed=1)
    first = merge_stores(tmp_path / "all", [one.path, two.path])
    assert verify_store(tmp_path / "all", deep=True).sound
    sidecar = CacheReader.open(tmp_path / "all").sidecar()
    assert sidecar.parts == ["head", "block2"] and sidecar.head().spec == HEAD
    assert merge_stores(tmp_path / "all", [one.path, two.path]).manifest == first.manifest
    (two.path / "teacher" / name).write_bytes(b"")
    with pytest.raises(FeatureStoreError, match=name):
        merge_stores(tmp_path / "other", [two.path])


def test_a_layer_is_one_of_the_teachers(plain: Filled, tmp_path: Path) -> None:
    filled = copy_of(plain, tmp_path / "store")
    add(filled.store, replace(BLOCK, layer=LAYERS))
    filled.store.publish_manifest()
    with pytest.raises(FeatureStoreError, match="another part or teacher"):
        CacheReader.open(filled.path).sidecar().block(LAYERS)
