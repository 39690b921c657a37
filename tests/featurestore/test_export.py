"""An export holds what the reader gives: every sample, every number, by way of Parquet's own reader."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import featurestore.maintenance.export
from featurestore.errors import MissingFeatureError
from featurestore.format.schema import NO_DRAW, HiddenFeatures, LogitsFeatures, LseFeatures
from featurestore.maintenance.export import find_groups, write_arrow, write_parquet
from featurestore.reader import CacheReader
from tests.featurestore.conftest import SPECS, Filled


def flat(value: list[list[float]]) -> list[float]:
    return [one for row in value for one in row]


def check_rows(reader: CacheReader, rows: list[dict[str, object]]) -> None:
    assert [row["id"] for row in rows] == reader.sample_ids
    for index, row in enumerate(rows):
        one = reader.read(index, SPECS)
        np.testing.assert_array_equal(row["tokens"], one.tokens)
        np.testing.assert_array_equal(row["loss_mask"], one.loss_mask)
        logits = one.features[SPECS[0]]
        assert isinstance(logits, LogitsFeatures) and logits.tail_ids is not None
        assert [len(head) for head in row["head_ids"]] == logits.counts.tolist()
        np.testing.assert_array_equal(flat(row["head_ids"]), logits.ids)
        logprobs = logits.logits - np.repeat(logits.lse, logits.counts)
        np.testing.assert_allclose(flat(row["head_logprobs"]), logprobs, rtol=1e-6)
        np.testing.assert_allclose(row["lse"], logits.lse)
        np.testing.assert_allclose(row["entropy"], logits.entropy)
        assert row["label_logprob"][-1] is None
        np.testing.assert_allclose(row["label_logprob"][:-1], logits.label_logprob[:-1])
        draws = [[i for i in row_ids if i != NO_DRAW] for row_ids in logits.tail_ids.tolist()]
        assert row["tail_ids"] == draws and [] in draws
        hidden = one.features[SPECS[2]]
        assert isinstance(hidden, HiddenFeatures)
        np.testing.assert_array_equal(np.asarray(row["hidden_L2"], np.float32), hidden.to_float32())
        lse = one.features[SPECS[3]]
        assert isinstance(lse, LseFeatures)
        np.testing.assert_array_equal(np.asarray(row["lse_T2"], np.float32), lse.lse)


@pytest.mark.parametrize("bound", [None, 40_000])
def test_parquet_holds_every_number(
    filled: Filled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: int | None
) -> None:
    """`bound`: so small that there are several shards and several row groups in one."""
    if bound:
        monkeypatch.setattr(featurestore.maintenance.export, "SHARD_BYTES", bound)
        monkeypatch.setattr(featurestore.maintenance.export, "ROW_GROUP_BYTES", bound // 2)
    reader = CacheReader.open(filled.path)
    seen: list[tuple[int, int]] = []
    paths = write_parquet(reader, find_groups(reader, None), tmp_path, lambda *step: seen.append(step))
    assert [p.name for p in paths] == [
        f"train-{i:05d}-of-{len(paths):05d}.parquet" for i in range(len(paths))
    ]
    files = [pq.ParquetFile(path) for path in paths]
    assert (len(files) > 2) == bool(bound) and (max(f.num_row_groups for f in files) > 1) == bool(bound)
    check_rows(reader, [row for file in files for row in file.read().to_pylist()])
    told = json.loads(files[0].schema_arrow.metadata[b"distily-cache"])
    assert told["manifest"] == reader.manifest_digest and told["teacher"] == reader.identity.to_json()
    assert seen[-1] == (reader.lengths.sum(), reader.lengths.sum())


def test_arrow_holds_the_same(filled: Filled, tmp_path: Path) -> None:
    reader = CacheReader.open(filled.path)
    (path,) = write_arrow(reader, find_groups(reader, None), tmp_path)
    with pa.memory_map(str(path)) as file:
        check_rows(reader, pa.ipc.open_stream(file).read_all().to_pylist())


def test_groups_by_name(filled: Filled, tmp_path: Path) -> None:
    reader = CacheReader.open(filled.path)
    assert find_groups(reader, None) == [SPECS[0], SPECS[3], SPECS[1], SPECS[2]]
    assert find_groups(reader, ["hidden.L2", "logits", "logits"]) == [SPECS[2], SPECS[0]]
    with pytest.raises(MissingFeatureError, match=r"hidden\.L3"):
        find_groups(reader, ["hidden.L3"])
    (path,) = write_parquet(reader, find_groups(reader, ["hidden.L2"]), tmp_path)
    assert pq.read_schema(path).names == ["id", "tokens", "loss_mask", "hidden_L2"]
