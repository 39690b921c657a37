"""The Triton reduction without a GPU: its numbers in Triton's interpreter, and that it compiles for GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from pipeline.capture import packing
from pipeline.capture.spec import CaptureSpec

ROOT = Path(__file__).parents[2]
NO_TRITON = "needs Triton, which a CUDA build of torch brings along: pip install triton"


def needs_triton(test: Any) -> Any:
    """Marks a test of `make triton`."""
    return pytest.mark.triton(pytest.mark.skipif(find_spec("triton") is None, reason=NO_TRITON)(test))


def run(arguments: list[str], **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


@needs_triton
def test_the_kernel_computes_what_reduce_py_does() -> None:
    """In a process of its own: the interpreter has to be asked for before Triton is imported."""
    quiet = ["-m", "pytest", "--noconftest", "-p", "no:cacheprovider", "-p", "no:xdist"]
    said = run([*quiet, "tests/pipeline/triton_interpreted.py"], TRITON_INTERPRET="1")
    assert " passed" in said and "skipped" not in said


@needs_triton
def test_the_kernel_compiles_for_gpus(tmp_path: Path) -> None:
    """For two generations, as a launch would; PTX and machine code come out, and are not run."""
    said = run(["-m", "tests.pipeline.triton_compiled"], TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert said.split() == ["sm_80", "f32", "sm_90", "bf16"]


class OnCuda(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = True  # type: ignore[assignment]


@pytest.mark.parametrize("there", [True, False])
def test_the_kernel_is_used_on_cuda_where_triton_is_installed(there: bool) -> None:
    spec = CaptureSpec(
        vocab_size=9,
        top_k=2,
        top_p=None,
        tail=0,
        seed=0,
        temperatures=(),
        layers=(),
        hidden_dtypes=(),
    )
    logits, labels, shifts = torch.randn(3, 9), torch.tensor([1, 2, -1]), torch.zeros(3).double()
    used: list[str] = []

    def mark(name: str) -> object:
        return lambda *_: used.append(name)

    with (
        patch.object(packing, "has_kernel", lambda _: there),
        patch.object(packing, "fused_fields", mark("kernel")),
        patch.object(packing, "_tile_fields", mark("reduce.py")),
    ):
        packing.distribution_fields(spec, logits.as_subclass(OnCuda), labels, shifts)
    assert used == ["kernel" if there else "reduce.py"]
    with patch.object(packing, "fused_fields", mark("kernel")):
        assert packing.distribution_fields(spec, logits, labels, shifts)["head_ids"].shape == (3, 2)
    assert used == ["kernel" if there else "reduce.py"], "never on a CPU"
