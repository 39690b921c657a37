"""What is captured of a sample depends on the sample alone: not on chunked prefill, batch, order or ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.pipeline.test_engine_agreement import HIDDEN_BOUND, LOGIT_BOUND

Arrays = dict[str, np.ndarray]
RUNS = {
    "whole": (4096, 0, 1),  # every prompt prefilled in one piece, in the order given
    "chunked": (48, 0, 1),
    "shuffled": (4096, 3, 1),
    "tensor-parallel": (4096, 0, 2),
}


@pytest.fixture(scope="module")
def captured(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Arrays]:
    """Each of RUNS on the same samples."""
    chance, folder = np.random.default_rng(1), tmp_path_factory.mktemp("captured")
    prompts = [chance.integers(3, 199, size=n).tolist() for n in (1, 2, 47, 48, 49, 150, 256, 30, 96)]
    (folder / "samples.json").write_text(json.dumps(prompts))
    (folder / "runs.json").write_text(json.dumps(RUNS))
    words = [tiny_teacher, folder / "samples.json", folder, folder / "runs.json"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.pipeline.capture_run", *map(str, words)],
        capture_output=True,
        check=False,
        text=True,
        timeout=600,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr[-3000:]
    out = {}
    for name in RUNS:
        with np.load(folder / f"{name}.npz") as arrays:
            out[name] = dict(arrays)
    return out


@pytest.mark.vllm
@pytest.mark.parametrize("name", [name for name in RUNS if name != "whole"])
def test_features_are_those_of_the_sample_alone(captured: dict[str, Arrays], name: str) -> None:
    whole, other = captured["whole"], captured[name]
    assert other.keys() == whole.keys()
    draws = same = 0
    for field, values in whole.items():
        found = other[field]
        assert found.shape == values.shape, field
        if field.endswith((".counts", ".ids")):
            np.testing.assert_array_equal(found, values, err_msg=field)
        elif field.endswith(".tail_ids"):
            draws, same = draws + values.size, same + int((found == values).sum())
        elif field.endswith(".hidden"):
            assert np.linalg.norm(found - values) <= HIDDEN_BOUND * np.linalg.norm(values), field
        else:
            np.testing.assert_allclose(found, values, atol=LOGIT_BOUND, err_msg=field)
    # The points are the same to the last bit; a border of the CDF within float32 noise of one may move past
    # it.
    assert same >= 0.999 * draws
