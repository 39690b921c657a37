"""What is captured of a sample depends on the sample alone: not on chunked prefill, batch, order or ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.pipeline.test_engine_agreement import HIDDEN_BOUND, LOGIT_BOUND


def capture(
    teacher: Path, samples: Path, out: Path, step: int, seed: int, processes: int
) -> dict[str, np.ndarray]:
    command = [
        sys.executable,
        "-m",
        "tests.pipeline.capture_run",
        teacher,
        samples,
        out,
        step,
        seed,
        processes,
    ]
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        check=False,
        text=True,
        timeout=600,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(out) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    chance = np.random.default_rng(1)
    prompts = [chance.integers(3, 199, size=n).tolist() for n in (1, 2, 47, 48, 49, 150, 256, 30, 96)]
    file = tmp_path_factory.mktemp("samples") / "samples.json"
    file.write_text(json.dumps(prompts))
    return file


@pytest.fixture(scope="module")
def whole(
    tiny_teacher: Path, samples: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, np.ndarray]:
    """Every prompt prefilled in one piece, in the order given."""
    return capture(tiny_teacher, samples, tmp_path_factory.mktemp("whole") / "whole.npz", 4096, 0, 1)


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("step", "seed", "processes"),
    [(48, 0, 1), (4096, 3, 1), (4096, 0, 2)],
    ids=["chunked", "shuffled", "tensor-parallel"],
)
def test_features_are_those_of_the_sample_alone(
    tiny_teacher: Path,
    samples: Path,
    whole: dict[str, np.ndarray],
    tmp_path: Path,
    step: int,
    seed: int,
    processes: int,
) -> None:
    other = capture(tiny_teacher, samples, tmp_path / "other.npz", step, seed, processes)
    assert other.keys() == whole.keys()
    draws = same = 0
    for name, values in whole.items():
        found = other[name]
        assert found.shape == values.shape, name
        if name.endswith((".counts", ".ids")):
            np.testing.assert_array_equal(found, values, err_msg=name)
        elif name.endswith(".tail_ids"):
            draws, same = draws + values.size, same + int((found == values).sum())
        elif name.endswith(".hidden"):
            assert np.linalg.norm(found - values) <= HIDDEN_BOUND * np.linalg.norm(values), name
        else:
            np.testing.assert_allclose(found, values, atol=LOGIT_BOUND, err_msg=name)
    # The points are the same to the last bit; a border of the CDF within float32 noise of one may move past
    # it.
    assert same >= 0.999 * draws
