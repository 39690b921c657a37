"""`distily-cache merge` and `export` as a user runs them: what they print, what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import numpy as np
import pytest

from featurestore.format.schema import LogitsSpec
from featurestore.reader import CacheReader
from featurestore.store import FeatureStore
from tests.command import cli
from tests.featurestore.conftest import SPECS, Filled, fill
from tests.featurestore.helpers import identity


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Filled:
    return fill(tmp_path_factory.mktemp("filled") / "store", SPECS)


def test_merge(filled: Filled, tmp_path: Path) -> None:
    code, out, err = cli("merge", tmp_path / "all", filled.path, "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["tasks"] == len(filled.tasks) and told["bytes"] > 0 and told["sources"] == 1
    assert CacheReader.open(tmp_path / "all").manifest_digest == told["manifest"]


def test_merge_refuses(filled: Filled, tmp_path: Path) -> None:
    other = FeatureStore.create(tmp_path / "other", identity(dtype="bfloat16")).path
    for source, what in ((other, "dtype"), (tmp_path / "none", "no store at")):
        code, _, err = cli("merge", tmp_path / "all", filled.path, source)
        assert code == 2 and what in err and len(err.splitlines()) == 1
        assert not (tmp_path / "all").exists()


@pytest.mark.parametrize("by", ["parquet", "folder"])
def test_exported_parquet_opens_in_datasets(filled: Filled, tmp_path: Path, by: str) -> None:
    code, out, err = cli("export", filled.path, tmp_path / "rows", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["files"] == ["train-00000-of-00001.parquet"]
    where = {"path": "parquet", "data_files": str(tmp_path / "rows" / "*.parquet")}
    options = where if by == "parquet" else {"path": str(tmp_path / "rows")}
    rows = datasets.load_dataset(**options, split="train", cache_dir=str(tmp_path / "hf"))
    check(rows, filled, [*SPECS])
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_exported_dataset_opens(filled: Filled, tmp_path: Path) -> None:
    code, _, err = cli("export", filled.path, tmp_path / "rows", "--format", "datasets", "--groups", "logits")
    assert code == 0, err
    rows = datasets.load_from_disk(str(tmp_path / "rows"))
    assert "hidden_L2" not in rows.column_names
    assert json.loads(rows.info.description)["teacher"]["name"] == "tiny"
    check(rows, filled, SPECS[:1])
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]


def check(rows: datasets.Dataset, filled: Filled, specs: list[object]) -> None:
    reader = CacheReader.open(filled.path)
    assert rows["id"][:] == reader.sample_ids
    for index in range(len(reader)):
        one, row = reader.read(index, specs), rows[index]
        logits = one.features[SPECS[0]]
        assert [i for head in row["head_ids"] for i in head] == logits.ids.tolist()
        np.testing.assert_allclose(row["entropy"], logits.entropy)
        assert row["label_logprob"][-1] is None
        if len(specs) > 1:
            hidden = one.features[SPECS[2]].to_float32()
            np.testing.assert_array_equal(np.asarray(row["hidden_L2"], np.float32), hidden)


def test_export_refuses(filled: Filled, tmp_path: Path) -> None:
    used = tmp_path / "used"
    used.mkdir()
    (used / "file").write_text("mine")
    for arguments, what in (
        ((filled.path, used), "not empty"),
        ((filled.path, used / "file"), "not empty"),
        ((filled.path, tmp_path / "new", "--format", "csv"), "--format csv"),
        ((filled.path, tmp_path / "new", "--groups", "hidden.L3"), "hidden.L3"),
        ((tmp_path / "none", tmp_path / "new"), "no store at"),
    ):
        code, _, err = cli("export", *arguments)
        assert code == 2 and what in err and len(err.splitlines()) == 1, err
    assert [path.name for path in tmp_path.iterdir()] == ["used"]
    assert (used / "file").read_text() == "mine"


def test_export_of_a_damaged_store_leaves_nothing(tmp_path: Path) -> None:
    store = fill(tmp_path / "store", [LogitsSpec(4)])
    shard = next((store.path / "parts").glob("*/logits-*/lse/c/0"))
    shard.write_bytes(shard.read_bytes()[:-1])
    code, _, err = cli("export", store.path, tmp_path / "rows")
    assert code == 1 and "lse" in err
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
