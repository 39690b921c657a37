"""docs/FORMAT.md is enough: a reader of zarr-python and pyarrow alone agrees with ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
import zarr
from blake3 import blake3

from featurestore.format.schema import GroupSpec, HiddenFeatures, HiddenSpec, LogitsSpec, LseSpec, group_id
from featurestore.reader import CacheReader
from tests.featurestore.conftest import fill


def record(path: Path) -> Any:
    """A sealed record, checked by the words of the format's page."""
    value = json.loads(path.read_bytes())
    seal = value.pop("blake3")
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"))
    assert seal == blake3(canonical.encode()).hexdigest()[:32]
    assert value["version"] == (2 if value["format"].endswith("/manifest") else 1)
    return value


def listed(root: Path) -> dict[str, dict[str, str]]:
    """task -> {group: digest of its commit record}, of the manifest of the last head."""
    head = sorted((root / "heads").iterdir())[-1].name
    manifest = root / f"MANIFEST-{head.split('-')[2]}.json"
    assert head.split("-")[2] == blake3(manifest.read_bytes()).hexdigest()[:32]
    tasks: dict[str, dict[str, str]] = {}
    for entry in record(manifest)["segments"]:
        path = root / "segments" / f"{entry['digest']}.arrow"
        data = path.read_bytes()
        assert len(data) == entry["bytes"] and entry["digest"] == blake3(data).hexdigest()[:32]
        (row,) = pa.ipc.open_file(path).read_all().to_pylist()
        groups = [name.rstrip(b"\0").decode() for name in row["group"]]
        for task, start, end in zip(row["task"], row["record_start"], row["record_start"][1:], strict=False):
            numbers = range(start, end)
            tasks[task.hex()] = {
                groups[row["record_group"][n]]: row["record_digest"][n].hex() for n in numbers
            }
    return tasks


def third_party_logits(root: Path, group: str) -> dict[str, list[list[tuple[int, float]]]]:
    """sample id -> per row, the head as (token id, logit)."""
    heads = {}
    for task, groups in listed(root).items():
        commit = root / "commit" / group / f"{task}.json"
        assert blake3(commit.read_bytes()).hexdigest()[:32] == groups[group]
        entry = record(commit)
        for name, (size, stamp) in entry["files"].items():
            data = (root / "parts" / entry["bundle"] / name).read_bytes()
            assert len(data) == size and xxhash.xxh3_64_hexdigest(data) == stamp
        bundle = record(root / "commit" / "samples" / f"{task}.json")["bundle"]
        samples = pq.read_table(root / "parts" / bundle / "samples.parquet").to_pylist()
        arrays = zarr.open_group(str(root / "parts" / entry["bundle"] / group), mode="r")
        column = {name: arrays[name][...] for name in arrays.array_keys()}
        row = cell = 0
        for i, sample in enumerate(samples):
            assert cell == column["sample_offsets"][i]
            heads[sample["id"]] = []
            for _ in range(sample["length"]):
                end = cell + int(column["head_count"][row])
                drops = np.cumsum(column["head_gaps"][cell:end].astype(np.int64)) / 16
                odds = int(column["head_odds"][row])
                mass = 1.0 if odds == 32_767 else 1 / (1 + np.exp(-odds / 128))
                logprobs = np.log(mass) - drops - np.log(np.exp(-drops).sum())
                logits = column["lse"][row] / 64 + logprobs
                ids = column["vocabulary"][column["head_index"][cell:end]].tolist()
                heads[sample["id"]].append(list(zip(ids, logits.tolist(), strict=True)))
                row, cell = row + 1, end
    return heads


def test_a_third_party_reads_the_same_logits(tmp_path: Path) -> None:
    spec = LogitsSpec(8, 0.9)
    path = fill(tmp_path / "s", [spec]).path
    heads = third_party_logits(path, group_id(spec))
    reader = CacheReader.open(path)
    assert set(heads) == set(reader.sample_ids)
    for i, sample_id in enumerate(reader.sample_ids):
        found = reader.read(i).features[spec]
        pairs = [pair for row in heads[sample_id] for pair in row]
        assert [token for token, _ in pairs] == found.ids.tolist()
        np.testing.assert_allclose([logit for _, logit in pairs], found.logits, rtol=1e-6)


def test_zarr_reads_the_same_hidden_states_over_many_chunks(tmp_path: Path) -> None:
    dtypes = ("bf16", "int8", "fp8", "f32", "int4", "int2")
    specs: list[GroupSpec] = [HiddenSpec(i % 5, dtype) for i, dtype in enumerate(dtypes)]
    path = fill(tmp_path / "s", specs, count=40, shard_tokens=10_000).path
    reader = CacheReader.open(path)
    (bundle,) = (path / "parts").iterdir()
    logical = ["bfloat16", "int8", "float8_e4m3fn", "float32", "int4 rows", "int2 rows"]
    for spec, name in zip(specs, logical, strict=True):
        group = zarr.open_group(str(bundle / group_id(spec)), mode="r")
        assert group["values"].attrs["logical_dtype"] == name
        found = [reader.read(i, [spec]).features[spec] for i in range(len(reader))]
        ours = np.concatenate([f.values for f in found if isinstance(f, HiddenFeatures)])
        assert len(ours) > 2 * 256, "several inner chunks, and samples that cross their borders"
        np.testing.assert_array_equal(ours, group["values"][...])


def test_a_third_party_reads_the_same_logsumexps(tmp_path: Path) -> None:
    spec = LseSpec(0.5)
    path = fill(tmp_path / "s", [spec], count=5, shard_tokens=10_000).path
    (bundle,) = (path / "parts").iterdir()
    assert group_id(spec).startswith("lse.T0.5-")
    array = zarr.open_group(str(bundle / group_id(spec)), mode="r")["lse"]
    reader = CacheReader.open(path)
    ours = np.concatenate([reader.read(i).features[spec].lse for i in range(len(reader))])
    np.testing.assert_allclose(array[...] / array.attrs["steps_per_nat"], ours, rtol=1e-7)
    assert array.dtype == np.int32 and array.attrs["steps_per_nat"] == 256


def test_every_name_in_a_store_is_in_the_format(tmp_path: Path) -> None:
    path = fill(tmp_path / "s", [LogitsSpec(4)], count=2).path
    assert {p.name.split("-")[0] for p in path.iterdir()} == {
        *("SPEC.json", "plan", "parts", "commit", "MANIFEST", "TEACHER", "teacher", "provenance"),
        *("segments", "heads", "pending"),
    }
