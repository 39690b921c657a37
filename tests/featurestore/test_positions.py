"""A share of the positions: which they are, and hidden states of them in a store."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from featurestore.errors import CorruptionError, MissingFeatureError, StoreFormatError
from featurestore.format.arrays import write_group
from featurestore.format.columns import Extent
from featurestore.format.kinds.hidden import HiddenKind
from featurestore.format.kinds.table import covers, kind_of, rest
from featurestore.format.positions import kept_positions
from featurestore.format.schema import HiddenFeatures, HiddenSpec, Sample, group_id
from featurestore.maintenance.export import write_parquet
from featurestore.maintenance.info import store_info
from featurestore.maintenance.verify import verify_store
from featurestore.reader import CacheReader
from featurestore.store import FeatureStore
from tests.featurestore.helpers import HIDDEN, assert_same, hidden, identity, sample, task_of

FULL = [HiddenSpec(1, dtype) for dtype in ("bf16", "f32", "int8", "fp8", "int4", "int2")]


def shares(positions: float, seed: int = 3) -> list[HiddenSpec]:
    return [HiddenSpec(1, spec.dtype, positions, seed) for spec in FULL]


def written(path: Path, samples: list[Sample], specs: list[HiddenSpec]) -> CacheReader:
    """One shard of what captures give, thinned as the committer does it."""
    store, task = FeatureStore.create(path, identity()), task_of(samples)
    store.add_plan([task])
    given = {spec: [kind_of(spec).keep(spec, hidden(one, spec), one) for one in samples] for spec in specs}
    store.write_bundle(task, samples, given)
    store.publish_manifest()
    return CacheReader.open(path)


def test_a_position_is_in_a_share_by_chance_and_in_every_larger_one() -> None:
    ids, length = [sample(i, 5).id for i in range(40)], 1000
    kept = {share: [kept_positions(one, length, share, 7) for one in ids] for share in (0.1, 0.5, 1.0)}
    for share, of_sample in kept.items():
        mean = np.mean([len(one) for one in of_sample]) / length
        # Five standard deviations of the mean of 40,000 draws.
        assert abs(mean - share) <= 5 * (share * (1 - share) / 40_000) ** 0.5
    for small, large in zip(kept[0.1], kept[0.5], strict=True):
        assert set(small) < set(large) and small.dtype == np.int32
    assert len({tuple(kept_positions(ids[0], length, 0.1, seed)) for seed in range(9)}) == 9
    np.testing.assert_array_equal(kept_positions(ids[0], 500, 0.5, 7), kept[0.5][0][kept[0.5][0] < 500])


def test_what_serves_what() -> None:
    full, half, tenth = HiddenSpec(1), HiddenSpec(1, "bf16", 0.5, 3), HiddenSpec(1, "bf16", 0.1, 3)
    for have, want in ((full, half), (half, tenth), (half, half)):
        assert covers(have, want)
    for have, want in ((half, full), (tenth, half), (HiddenSpec(1, "bf16", 0.5, 4), tenth)):
        assert not covers(have, want)
    assert group_id(full) == group_id(HiddenSpec(1, "bf16", 1)) != group_id(half)


def test_a_store_of_a_share(tmp_path: Path) -> None:
    samples = [sample(i, 40 + i) for i in range(6)]
    reader = written(tmp_path / "store", samples, [*shares(0.4), *FULL])
    assert verify_store(tmp_path / "store", deep=True).sound
    # The widest of a kind is at all positions, and of them the most precise one.
    assert reader.find("hidden.L1") == HiddenSpec(1, "f32")
    for i, one in enumerate(samples):
        for share, full in zip(shares(0.4), FULL, strict=True):
            given = hidden(one, full).at(kept_positions(one.id, len(one), 0.4, 3))
            found = reader.read(i, [share]).features[share]
            assert_same(found, given)
            np.testing.assert_array_equal(found.positions, given.positions)
            assert found.to_float32().shape == (len(found.positions), HIDDEN)
        # A smaller share is served from a larger one; with another seed from all positions only.
        for want in (HiddenSpec(1, "int8", 0.1, 3), HiddenSpec(1, "int8", 0.1, 8)):
            found = reader.read(i, [want]).features[want]
            np.testing.assert_array_equal(found.positions, kept_positions(one.id, len(one), 0.1, want.seed))
            assert_same(found, hidden(one, HiddenSpec(1, "int8")).at(found.positions))


def test_bytes_of_a_share(tmp_path: Path) -> None:
    """As estimated, but for metadata: some kB a shard."""
    spec = HiddenSpec(1, "f32", 0.25)
    samples = [sample(i, 4000) for i in range(5)]
    written(tmp_path / "store", samples, [spec])
    found = store_info(tmp_path / "store").groups[group_id(spec)]
    assert found.rows == 20_000
    assert found.bytes_per_row == pytest.approx(kind_of(spec).row_bytes(spec, HIDDEN), rel=0.08)


def test_an_export_leaves_the_others_empty(tmp_path: Path) -> None:
    spec, samples = HiddenSpec(1, "f32", 0.3), [sample(i, 30) for i in range(3)]
    reader = written(tmp_path / "store", samples, [spec])
    (tmp_path / "export").mkdir()
    write_parquet(reader, [spec], tmp_path / "export")
    rows = pq.read_table(tmp_path / "export")["hidden_L1"].to_pylist()
    for i, row in enumerate(rows):
        found = reader.read(i).features[spec]
        assert [t for t, state in enumerate(row) if state] == found.positions.tolist()
        np.testing.assert_array_equal([state for state in row if state], found.to_float32())


def test_a_shard_of_which_nothing_is_kept(tmp_path: Path) -> None:
    specs = [HiddenSpec(2, spec.dtype, 1e-9) for spec in FULL]
    reader = written(tmp_path / "store", [sample(1, 9)], specs)
    for spec in specs:
        found = reader.read(0, [spec]).features[spec]
        assert not len(found.positions) and found.to_float32().shape == (0, HIDDEN)
    assert verify_store(tmp_path / "store", deep=True).sound


def test_features_that_are_no_share_are_refused() -> None:
    spec, one = HiddenSpec(1, "f32", 0.5), sample(1, 9)
    for bad, match in (
        (hidden(one, spec), "positions are needed"),
        (hidden(one, spec).at(np.array([3, 3], np.int32)), "ascend"),
        (
            HiddenFeatures(np.zeros((1, HIDDEN), np.float32), None, "f32", positions=np.array([9], np.int32)),
            "8",
        ),
    ):
        with pytest.raises(ValueError, match=match):
            HiddenKind().check(spec, bad, 9, identity())


@pytest.mark.parametrize(
    ("positions", "offsets", "match"),
    [
        ([1, 2, 0], [0, 2, 2], "no offsets"),
        ([1, 2, 0], [0, 4, 3], "no offsets"),
        ([1, 2, 0], [1, 2, 3], "no offsets"),
        ([2, 1, 0], [0, 2, 3], "no positions"),
        ([1, 4, 0], [0, 2, 3], "no positions"),
        ([-1, 2, 0], [0, 2, 3], "no positions"),
    ],
)
def test_positions_that_no_sample_has(
    tmp_path: Path, positions: list[int], offsets: list[int], match: str
) -> None:
    spec, kind = HiddenSpec(1, "f32", 0.5), HiddenKind()
    extent = Extent(rows=8, samples=2, entries=3, distinct_ids=0, vocab_size=9, hidden_size=2)
    arrays = {
        "values": np.zeros((3, 2), np.float32),
        "positions": np.array(positions, np.int32),
        "sample_offsets": np.array(offsets, np.int64),
    }
    write_group(tmp_path / "group", {}, kind.layouts(spec, extent), arrays)
    with pytest.raises(CorruptionError, match=match):
        kind.open(spec, tmp_path / "group", extent, None)(0, 0, 4)


def extended(path: Path, samples: list[Sample], *steps: list[HiddenSpec]) -> CacheReader:
    """Captures one after the other; each writes what the store then lacks of what is asked for."""
    store, task = FeatureStore.create(path, identity()), task_of(samples)
    store.add_plan([task])
    held: list[HiddenSpec] = []
    for wanted in steps:
        added = [spec for want in wanted if (spec := rest(held, want)) is not None]
        given = {
            spec: [kind_of(spec).keep(spec, hidden(one, spec), one) for one in samples] for spec in added
        }
        store.write_bundle(task, samples, given)
        held += added
        store.publish_manifest()
    return CacheReader.open(path)


@pytest.mark.parametrize("dtype", [spec.dtype for spec in FULL])
def test_a_share_is_extended_by_the_further_positions_alone(tmp_path: Path, dtype: str) -> None:
    samples = [sample(i, 60 + i) for i in range(5)]
    steps = [HiddenSpec(1, dtype, share, 3) for share in (0.2, 0.5, 0.9)]
    reader = extended(tmp_path / "store", samples, *([one] for one in steps))
    added = [HiddenSpec(1, dtype, b, 3, above=a) for a, b in ((0.0, 0.2), (0.2, 0.5), (0.5, 0.9))]
    assert set(reader.groups.values()) == set(added)
    assert reader.find("hidden.L1") == steps[-1] and reader.complete_groups() == steps[-1:]
    assert verify_store(tmp_path / "store", deep=True).sound
    for index, one in enumerate(samples):
        # Also a share that begins and ends inside of groups, and the part of one.
        wants = (*steps, HiddenSpec(1, dtype, 0.7, 3), HiddenSpec(1, dtype, 0.8, 3, above=0.3))
        found = reader.read(index, wants).features
        for want in wants:
            kept = kept_positions(one.id, len(one), want.positions, 3, want.above)
            np.testing.assert_array_equal(found[want].positions, kept)
            assert_same(found[want], hidden(one, HiddenSpec(1, dtype)).at(kept))
    info = store_info(tmp_path / "store").groups
    assert [info[group_id(spec)].share_of_positions for spec in added] == pytest.approx([0.2, 0.3, 0.4])
    entries = [HiddenKind().keep(spec, hidden(one, spec), one).values for spec in added for one in samples]
    assert sum(map(len, entries)) == sum(len(kept_positions(s.id, len(s), 0.9, 3)) for s in samples)


@pytest.mark.parametrize("dtype", [spec.dtype for spec in FULL])
def test_a_share_is_extended_to_all_positions(tmp_path: Path, dtype: str) -> None:
    """Whatever its seed is; no other part of the store differs from that of all positions."""
    samples = [sample(i, 30 + i) for i in range(3)]
    full = HiddenSpec(1, dtype)
    reader = extended(tmp_path / "store", samples, [HiddenSpec(1, dtype, 0.4, 3)], [full])
    assert HiddenSpec(1, dtype, 1.0, 3, above=0.4) in reader.groups.values()
    assert reader.find("hidden.L1") == full
    for index, one in enumerate(samples):
        found = reader.read(index, [full]).features[full]
        assert found.positions is None
        assert_same(found, hidden(one, full))


def test_what_is_added_to_what() -> None:
    def part(above: float, positions: float, seed: int = 3) -> HiddenSpec:
        return HiddenSpec(1, "bf16", positions, seed, above)

    assert rest([part(0, 0.2)], part(0, 0.5)) == part(0.2, 0.5)
    assert rest([part(0, 0.2), part(0.2, 0.5)], part(0, 0.6)) == part(0.5, 0.6)
    assert rest([part(0, 0.4), part(0.2, 0.5)], part(0, 0.5)) is None
    assert rest([part(0.2, 0.5)], part(0, 0.5)) == part(0, 0.5)  # nothing of it is at the beginning
    assert rest([part(0, 0.2, 4)], part(0, 0.5)) == part(0, 0.5)  # other positions
    assert rest([HiddenSpec(2, "bf16", 0.2, 3)], part(0, 0.5)) == part(0, 0.5)
    assert rest([HiddenSpec(1, "int8", 0.2, 3)], part(0, 0.5)) == part(0, 0.5)
    assert rest([HiddenSpec(1)], part(0, 0.5)) is None
    # All positions, of any seed: the one that reaches furthest.
    assert rest([part(0, 0.2), part(0, 0.3, 5)], HiddenSpec(1)) == part(0.3, 1, 5)
    for bad in (0.5, -0.1, 0.7, "0"):
        with pytest.raises(StoreFormatError, match="left out"):
            HiddenSpec(1, "bf16", 0.5, 3, bad)  # type: ignore[arg-type]


def test_tasks_that_were_extended_otherwise_serve_one_share(tmp_path: Path) -> None:
    """A shard with all of a share in one group, and one with it in two."""
    samples = [sample(i, 40) for i in range(4)]
    store, tasks = (
        FeatureStore.create(tmp_path / "store", identity()),
        [task_of(samples[:2]), task_of(samples[2:])],
    )
    store.add_plan(tasks)
    small, large = HiddenSpec(1, "f32", 0.3, 3), HiddenSpec(1, "f32", 0.6, 3)
    further = rest([small], large)
    for task, some, specs in ((tasks[0], samples[:2], [large]), (tasks[1], samples[2:], [small, further])):
        store.write_bundle(
            task,
            some,
            {spec: [kind_of(spec).keep(spec, hidden(one, spec), one) for one in some] for spec in specs},
        )
    store.publish_manifest()
    reader = CacheReader.open(tmp_path / "store")
    assert set(reader.complete_groups()) == {small, large}
    for index, one in enumerate(samples):
        found = reader.read(index, [large]).features[large]
        np.testing.assert_array_equal(found.positions, kept_positions(one.id, len(one), 0.6, 3))
    with pytest.raises(MissingFeatureError):
        reader.read(0, [HiddenSpec(1, "f32", 0.7, 3)])
