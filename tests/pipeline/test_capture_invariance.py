"""What is captured of a sample depends on the sample alone: not on chunked prefill, batch, order or ranks,
and not on which of its two model runners vLLM takes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.command import run_module
from tests.pipeline import triton_cpu
from tests.pipeline.test_engine_agreement import HIDDEN_BOUND, LOGIT_BOUND
from tests.pipeline.test_reduce_triton import needs_triton

Arrays = dict[str, np.ndarray]
RUNS = {
    "tensor-parallel": (4096, 0, 2),  # first: its processes are forked
    "whole": (4096, 0, 1),  # every prompt prefilled in one piece, in the order given
    "shuffled and chunked": (96, 3, 1),
}
# These cover what the runners do differently.
RUNS_OF_BOTH = ("shuffled and chunked", "tensor-parallel")

ON_GPU = torch.cuda.is_available()


@pytest.fixture(scope="module")
def inputs(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The teacher and the samples, as `capture_run` takes them."""
    chance, folder = np.random.default_rng(1), tmp_path_factory.mktemp("inputs")
    prompts = [chance.integers(3, 199, size=n).tolist() for n in (1, 2, 47, 95, 96, 97, 150, 256, 30)]
    (folder / "samples.json").write_text(json.dumps(prompts))
    return [tiny_teacher, folder / "samples.json"]


def capture(
    inputs: list[Path], folder: Path, names: Sequence[str], variables: dict[str, str]
) -> dict[str, Arrays]:
    """These of RUNS, in one process with these variables in its environment."""
    runs = folder / "runs.json"
    runs.write_text(json.dumps({name: RUNS[name] for name in names}))
    run_module("tests.pipeline.capture_run", *inputs, folder, runs, variables=variables)
    out = {}
    for name in names:
        with np.load(folder / f"{name}.npz") as arrays:
            out[name] = dict(arrays)
    return out


@pytest.fixture(scope="module")
def captured(inputs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Arrays]:
    """Each of RUNS by vLLM's own choice of a model runner on a GPU, which is V2, and by V1 on a CPU."""
    variables = {} if ON_GPU else {"VLLM_USE_V2_MODEL_RUNNER": "0"}
    return capture(inputs, tmp_path_factory.mktemp("captured"), tuple(RUNS), variables)


@pytest.fixture(scope="module")
def captured_by_v2(inputs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Arrays]:
    """RUNS_OF_BOTH by V2, whose kernels Triton runs as Python."""
    folder = tmp_path_factory.mktemp("v2")
    return capture(inputs, folder, RUNS_OF_BOTH, triton_cpu.environment(folder / "packages"))


@pytest.mark.vllm
@needs_triton
@pytest.mark.skipif(ON_GPU, reason="vLLM takes V2 here by itself, and bits are promised on CPUs")
@pytest.mark.parametrize("name", RUNS_OF_BOTH)
def test_both_model_runners_give_the_same_bits(
    captured: dict[str, Arrays], captured_by_v2: dict[str, Arrays], name: str
) -> None:
    """vLLM's choice is V1 on a CPU, which most tests run on, and V2 on CUDA."""
    v1, v2 = captured[name], captured_by_v2[name]
    assert v2.keys() == v1.keys()
    for field, values in v1.items():
        assert (v2[field].dtype, v2[field].shape) == (values.dtype, values.shape), field
        assert v2[field].tobytes() == values.tobytes(), field


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
        elif ".hidden." in field:
            assert np.linalg.norm(found - values) <= HIDDEN_BOUND * np.linalg.norm(values), field
        else:
            np.testing.assert_allclose(found, values, atol=LOGIT_BOUND, err_msg=field)
    # The points are the same to the last bit; a border of the CDF within float32 noise of one may move past
    # it.
    assert same >= 0.999 * draws
