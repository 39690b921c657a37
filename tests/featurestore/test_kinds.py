"""A kind of column group is one entry of a table: nothing outside of it asks which kind a spec is."""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featurestore.errors import MissingFeatureError, StoreFormatError
from featurestore.format.arrays import ChunkCache, ShardArray
from featurestore.format.columns import ArrayLayout, Extent, Stats, compressed
from featurestore.format.kinds.arrow import IDS
from featurestore.format.kinds.base import GroupKind, ReadSample
from featurestore.format.kinds.table import KINDS, group_spec_from_json
from featurestore.format.plan import plan_generation, split_tasks
from featurestore.format.schema import LogitsSpec, TeacherIdentity, group_id
from featurestore.format.states.transform import Basis
from featurestore.maintenance.export import find_groups, write_parquet
from featurestore.maintenance.info import store_info
from featurestore.maintenance.merge import merge_stores
from featurestore.maintenance.verify import verify_store
from featurestore.reader import CacheReader
from featurestore.store import FeatureStore
from tests.featurestore.helpers import features, identity, sample

PACKAGE = Path(__file__).parents[2] / "featurestore"


@dataclass(frozen=True)
class RankSpec:
    """The rank of the label, up to `most`."""

    most: int

    @property
    def kind(self) -> str:
        return "rank"

    def to_json(self) -> dict[str, Any]:
        return {"kind": "rank", "most": self.most}


class RankKind(GroupKind[RankSpec, np.ndarray, np.ndarray]):
    """Features are int64 [T], stored as uint16 [R]."""

    name, ids, spec, stats = "rank", "rank", RankSpec, ("highest",)

    def covers(self, have: RankSpec, want: RankSpec) -> bool:
        return have.most >= want.most

    def width(self, spec: RankSpec) -> tuple[float, ...]:
        return (spec.most,)

    def flag(self, kind: str) -> str | None:
        return "--ranks N" if kind == "rank" else None

    def check(self, spec: RankSpec, one: Any, length: int, identity: TeacherIdentity) -> None:
        if one.shape != (length,) or int(one.max()) > spec.most:
            raise ValueError(f"ranks are [{length}] and at most {spec.most}")

    def layouts(self, spec: RankSpec, extent: Extent) -> dict[str, ArrayLayout]:
        return {"rank": compressed((extent.rows,), np.uint16)}

    def pack(
        self, spec: RankSpec, features: Sequence[np.ndarray], identity: TeacherIdentity
    ) -> tuple[dict[str, np.ndarray], Stats]:
        ranks = np.concatenate(features)
        return {"rank": ranks.astype(np.uint16)}, {"highest": int(ranks.max())}

    def check_stats(self, spec: RankSpec, stats: Stats, rows: int, where: str) -> None:
        if stats["highest"] > spec.most:
            raise StoreFormatError(f"{where}: a rank above {spec.most}")

    def open(
        self,
        spec: RankSpec,
        directory: Path,
        extent: Extent,
        cache: ChunkCache | None,
        basis: Basis | None = None,
    ) -> ReadSample[np.ndarray]:
        ranks = ShardArray(directory / "rank", self.layouts(spec, extent)["rank"], cache)
        return lambda _, start, stop: ranks.read(start, stop)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        return codes.astype(np.int64)

    def cut(self, codes: Any, have: Any, want: Any, sample: Any, identity: Any) -> np.ndarray:
        return np.minimum(codes, want.most)

    def measures(self, spec: RankSpec, stats: Stats, rows: int) -> dict[str, float | None]:
        return {"perplexity": 1.5}

    def row_bytes(self, spec: RankSpec, hidden_size: int) -> float:
        return 2

    def export_row_bytes(self, spec: RankSpec, hidden_size: int) -> int:
        return 4

    def export_fields(self, spec: RankSpec) -> list[tuple[str, Any]]:
        return [("rank", IDS)]

    def export_columns(
        self, spec: RankSpec, features: Sequence[np.ndarray], lengths: Sequence[int]
    ) -> dict[str, Any]:
        return {"rank": pa.array(np.concatenate(features).astype(np.int32))}


def test_a_fourth_kind_costs_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, RankSpec, RankKind())
    wide, narrow, other = RankSpec(500), RankSpec(9), LogitsSpec(4)
    assert group_spec_from_json(json.loads(json.dumps(wide.to_json()))) == wide
    with pytest.raises(StoreFormatError, match=r"column group rank: unknown or missing fields \['x'\]"):
        group_spec_from_json({"kind": "rank", "x": 1})

    samples = {one.id: one for one in map(sample, range(6))}
    ranks = {key: np.arange(len(one)) * 13 % 400 for key, one in samples.items()}
    tasks = split_tasks([(key, len(one)) for key, one in samples.items()], 60)
    store = FeatureStore.create(tmp_path / "store", identity())
    store.add_plan(tasks)
    for task in tasks:
        members = [samples[key] for key in task.sample_ids]
        given = {wide: [ranks[key] for key in task.sample_ids], **features(members, [other])}
        with pytest.raises(ValueError, match="rank, sample 0 of the task: ranks are"):
            store.write_bundle(task, members, {wide: [np.full(len(one), 501) for one in members]})
        store.write_bundle(task, members, given)
    store.publish_manifest()
    assert group_id(wide) in store.group_specs()
    again = plan_generation(
        known_tasks=store.known_tasks(),
        committed={group: set(records) for group, records in store.commits().items()},
        committed_specs=store.group_specs(),
        wanted=[(key, len(one)) for key, one in samples.items()],
        groups=[narrow],
        shard_tokens=60,
    )
    assert again.rows_total and not again.work, "the wide group covers it"

    assert verify_store(store.path, deep=True).sound
    merge_stores(tmp_path / "merged", [store.path])
    reader = CacheReader.open(tmp_path / "merged")
    assert reader.find("rank") == wide
    for index, key in enumerate(reader.sample_ids):
        read = reader.read(index, [wide, narrow]).features
        np.testing.assert_array_equal(read[wide], ranks[key])
        np.testing.assert_array_equal(read[narrow], np.minimum(ranks[key], 9))
        assert reader.read_codes(index, [wide]).features[wide].dtype == np.uint16
    (file,) = write_parquet(reader, find_groups(reader, None), tmp_path)
    assert pq.read_table(file)["rank"].to_pylist() == [ranks[key].tolist() for key in reader.sample_ids]
    (told,) = (group for group in store_info(store.path).groups.values() if group.kind == "rank")
    assert told.perplexity == 1.5 and set(told.arrays) == {"rank", "zarr.json"}


def test_a_missing_kind_names_its_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = sample(1, 8)
    (task,) = split_tasks([(one.id, 8)], 8)
    store = FeatureStore.create(tmp_path / "store", identity())
    store.add_plan([task])
    store.write_bundle(task, [one], features([one], [LogitsSpec(4)]))
    store.publish_manifest()
    reader = CacheReader.open(store.path)
    for kind, flag in (
        ("hidden.L2", "--hidden-layers 2"),
        ("lse.T0.5", "--temperatures 0.5"),
        ("rank", "that adds it"),
    ):
        with pytest.raises(MissingFeatureError, match=flag):
            reader.find(kind)
    monkeypatch.setitem(KINDS, RankSpec, RankKind())
    with pytest.raises(MissingFeatureError, match="--ranks N"):
        reader.find("rank")


def test_no_switch_on_kinds_outside_the_table() -> None:
    """What `CacheReader.find_logits` and `inspect` want is logits alone: a selection, not a switch."""
    selections = {"reader.py": {"LogitsSpec"}, "maintenance/inspect.py": {"LogitsFeatures"}}
    asked: dict[str, set[str]] = {}
    for file in PACKAGE.rglob("*.py"):
        name = file.relative_to(PACKAGE).as_posix()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
                classes = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
                kinds = {c for c in classes if c.startswith(("Logits", "Hidden", "Lse"))}
                if kinds and not name.startswith("format/kinds/"):
                    asked.setdefault(name, set()).update(kinds)
    assert asked == selections
