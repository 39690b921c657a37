"""Format version 1, as it lies on people's disks: this store was written once and must be readable for ever.

It was made by `python -m tests.featurestore.test_fixture` and is never made again.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from featurestore.format.codec import head_mass
from featurestore.format.kinds.table import kind_of
from featurestore.format.schema import HiddenFeatures, HiddenSpec, LogitsFeatures, LogitsSpec
from featurestore.maintenance.verify import verify_store
from featurestore.reader import CacheReader
from featurestore.store import FeatureStore
from tests.featurestore.conftest import fill
from tests.featurestore.helpers import features, identity, sample, task_of

FIXTURES = {number: Path(__file__).parent / "fixtures" / f"version-{number}" for number in (1, 2)}
# Of all that is read, as it was when each was written; the same samples lie in both.
FINGERPRINT = "059555c9657a11882be59b36b830e3b1"
LOGITS = LogitsSpec(6, 0.8, tail=4, seed=2)
HIDDEN = [HiddenSpec(0, "f32"), HiddenSpec(1, "bf16"), HiddenSpec(2, "int8"), HiddenSpec(4, "fp8")]
# Types and shares of hidden states that came later, in a store of their own.
LATER = Path(__file__).parent / "fixtures" / "hidden-shares"
SHARES = [HiddenSpec(1, "int4"), HiddenSpec(2, "int8", 0.5, 3), HiddenSpec(4, "int4", 0.25)]
LATER_FINGERPRINT = "2f94f5e0d00dd08ad338e0362ca000f5"


def fingerprint(reader: CacheReader) -> str:
    """A hash of all that is read, numbers rounded to what the format promises and more."""
    hasher = hashlib.sha256()
    for index in range(len(reader)):
        sample = reader.read(index, [LOGITS, *HIDDEN])
        hasher.update(sample.id.encode() + sample.tokens.tobytes() + sample.loss_mask.tobytes())
        logits = sample.features[LOGITS]
        assert isinstance(logits, LogitsFeatures) and logits.tail_ids is not None
        for exact in (logits.counts, logits.ids, logits.tail_ids, logits.lse, logits.entropy):
            hasher.update(np.ascontiguousarray(exact).tobytes())
        hasher.update(np.rint(logits.logits * 1000).astype(np.int32).tobytes())
        hasher.update(np.nan_to_num(logits.label_logprob).tobytes())
        for spec in HIDDEN:
            hidden = sample.features[spec]
            assert isinstance(hidden, HiddenFeatures)
            hasher.update(hidden.to_float32().tobytes())
    return hasher.hexdigest()[:32]


@pytest.mark.parametrize("number", FIXTURES)
def test_every_version_reads_as_it_was_written(number: int) -> None:
    reader = CacheReader.open(FIXTURES[number])
    assert fingerprint(reader) == FINGERPRINT
    assert len(reader) == 5 and sorted(reader.groups) == [
        "hidden.L0-9f50a19c",
        "hidden.L1-646d568d",
        "hidden.L2-29fe350e",
        "hidden.L4-dcb4cb24",
        "logits-9dc71049",
    ]
    assert verify_store(FIXTURES[number], deep=True).sound


def fingerprint_of_shares(reader: CacheReader) -> str:
    """A hash of all hidden states that are read, and of where they are."""
    hasher = hashlib.sha256()
    for index in range(len(reader)):
        for found in reader.read(index, SHARES).features.values():
            assert isinstance(found, HiddenFeatures)
            hasher.update(found.to_float32().tobytes())
            hasher.update(b"" if found.positions is None else found.positions.astype(np.int64).tobytes())
    return hasher.hexdigest()[:32]


def test_shares_and_four_bits_read_as_they_were_written() -> None:
    reader = CacheReader.open(LATER)
    assert fingerprint_of_shares(reader) == LATER_FINGERPRINT
    assert len(reader) == 3 and set(reader.groups.values()) == set(SHARES)
    assert verify_store(LATER, deep=True).sound


@pytest.mark.parametrize("number", FIXTURES)
def test_every_version_is_extended(number: int, tmp_path: Path) -> None:
    """By a task, and by a column group of one that is there; the old manifest reads as before."""
    shutil.copytree(FIXTURES[number], tmp_path / "store")
    old = CacheReader.open(tmp_path / "store")
    store, extra = FeatureStore.open(tmp_path / "store"), HiddenSpec(3, "bf16")
    task = next(iter(store.known_tasks().values()))
    store.write_bundle(task, members := store.read_samples(task.id), features(members, [extra]))
    one = sample(900, 7)
    store.add_plan([task_of([one])])
    store.write_bundle(task_of([one]), [one], features([one], [LOGITS, *HIDDEN]))
    manifest = store.publish_manifest()
    new = CacheReader.open(tmp_path / "store")
    assert new.manifest_digest == manifest.digest and sorted(new.sample_ids) == sorted(
        [*old.sample_ids, one.id]
    )
    assert new.read(list(new.sample_ids).index(members[0].id), [extra]).features.keys() == {extra}
    again = CacheReader.open(tmp_path / "store", old.manifest_digest)
    assert fingerprint(again) == FINGERPRINT
    assert verify_store(tmp_path / "store", deep=True).sound


def test_the_example_reads_it_with_zarr_and_pyarrow_alone() -> None:
    script = Path(__file__).parents[2] / "examples" / "read_store.py"
    code = "\n".join(script.read_text().split('"""', 2)[2].strip().splitlines())
    assert len(code.splitlines()) <= 30 and "featurestore" not in code
    done = subprocess.run(
        [sys.executable, str(script), str(FIXTURES[2])],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    reader = CacheReader.open(FIXTURES[2])
    printed = [
        [
            (int(token), float(p))
            for token, p in re.findall(r"(\d+): ([\d.]+)", line.split(";")[0].split(": ", 1)[1])
        ]
        for line in done.stdout.splitlines()
    ]
    found = {tuple(s.tokens.tolist()): s for s in (reader.read(i, [LOGITS]) for i in range(len(reader)))}
    tokens = tuple(int(line.split(":")[0].split()[-1]) for line in done.stdout.splitlines())
    logits = found[tokens].features[LOGITS]
    assert isinstance(logits, LogitsFeatures)
    starts = np.cumsum(logits.counts, dtype=int) - logits.counts
    for row, pairs in enumerate(printed):
        assert [token for token, _ in pairs] == logits.ids[starts[row] :][
            : min(5, logits.counts[row])
        ].tolist()
        own = np.exp(logits.logits[starts[row] :][: len(pairs)] - logits.lse[row])
        np.testing.assert_allclose([p for _, p in pairs], own, atol=1e-4)
    outside = [float(line.rsplit(" ", 1)[1]) for line in done.stdout.splitlines()]
    mass = head_mass(logits.counts, logits.logits, logits.lse)
    np.testing.assert_allclose(outside, 1 - mass, atol=1e-4)


def write_shares(path: Path) -> None:
    """The store of SHARES."""
    members = [sample(number, 9 + number) for number in range(3)]
    made = features(members, [*SHARES])
    kept = {
        spec: [kind_of(spec).keep(spec, one, member) for one, member in zip(of, members, strict=True)]
        for spec, of in made.items()
    }
    store = FeatureStore.create(path, identity())
    store.add_plan([task_of(members)])
    store.write_bundle(task_of(members), members, kept)
    store.publish_manifest()


if __name__ == "__main__":
    fill(FIXTURES[2], [LOGITS, *HIDDEN], count=5)
    write_shares(LATER)
