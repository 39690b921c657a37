"""Format version 1, as it lies on people's disks: this store was written once and must be readable for ever.

It was made by `python -m tests.featurestore.test_fixture` and is never made again.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

from featurestore.format.codec import head_mass
from featurestore.format.schema import HiddenFeatures, HiddenSpec, LogitsFeatures, LogitsSpec
from featurestore.maintenance.verify import verify_store
from featurestore.reader import CacheReader
from tests.featurestore.conftest import fill

FIXTURE = Path(__file__).parent / "fixtures" / "version-1"
LOGITS = LogitsSpec(6, 0.8, tail=4, seed=2)
HIDDEN = [HiddenSpec(0, "f32"), HiddenSpec(1, "bf16"), HiddenSpec(2, "int8"), HiddenSpec(4, "fp8")]


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


def test_version_1_reads_as_it_was_written() -> None:
    reader = CacheReader.open(FIXTURE)
    assert fingerprint(reader) == "059555c9657a11882be59b36b830e3b1"
    assert len(reader) == 5 and sorted(reader.groups) == [
        "hidden.L0-9f50a19c",
        "hidden.L1-646d568d",
        "hidden.L2-29fe350e",
        "hidden.L4-dcb4cb24",
        "logits-9dc71049",
    ]
    assert verify_store(FIXTURE, deep=True).sound


def test_the_example_reads_it_with_zarr_and_pyarrow_alone() -> None:
    script = Path(__file__).parents[2] / "examples" / "read_store.py"
    code = "\n".join(script.read_text().split('"""', 2)[2].strip().splitlines())
    assert len(code.splitlines()) <= 30 and "featurestore" not in code
    done = subprocess.run(
        [sys.executable, str(script), str(FIXTURE)], capture_output=True, text=True, check=True, timeout=60
    )
    reader = CacheReader.open(FIXTURE)
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


if __name__ == "__main__":
    fill(FIXTURE, [LOGITS, *HIDDEN], count=5)
