"""What vLLM's wrapper around transformers' classes passes over, and the stand-in for torchvision."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.capture.wrapped import unheeded

LAYER = SimpleNamespace(sliding_window=None, impl=SimpleNamespace(scale=0.125, logits_soft_cap=None))
WINDOWED = SimpleNamespace(sliding_window=32, impl=SimpleNamespace(scale=0.125, logits_soft_cap=5.0))


@pytest.mark.parametrize(
    ("layer", "wanted"),
    [
        (LAYER, {}),
        (LAYER, {"scaling": 0.125, "sliding_window": None, "softcap": None, "dropout": 0.0}),
        (LAYER, {"scaling": 0.125 * (1 + 1e-7), "s_aux": torch.zeros(2), "is_causal": True}),
        (WINDOWED, {"scaling": 0.125, "sliding_window": 32, "softcap": 5.0}),
        # Llama's class does not say what its configuration says to both.
        (WINDOWED, {"scaling": 0.125}),
    ],
)
def test_what_vllm_does_is_heeded(layer: Any, wanted: dict[str, Any]) -> None:
    assert unheeded(layer, None, wanted) is None


@pytest.mark.parametrize(
    ("layer", "mask", "wanted", "reason"),
    [
        (LAYER, torch.zeros(1, 1, 4, 4), {}, "attention mask of its own"),
        (LAYER, None, {"is_causal": False}, "not causal"),
        (LAYER, None, {"scaling": 0.25}, "scaling is 0.25, vLLM's 0.125"),
        (LAYER, None, {"sliding_window": 64}, "sliding_window is 64, vLLM's None"),
        (WINDOWED, None, {"sliding_window": 64}, "sliding_window is 64, vLLM's 32"),
        (LAYER, None, {"softcap": 5.0}, "softcap is 5.0, vLLM's None"),
        (LAYER, None, {"position_bias": torch.zeros(1)}, "takes position_bias"),
    ],
)
def test_what_vllm_does_not_do_is_named(layer: Any, mask: Any, wanted: dict[str, Any], reason: str) -> None:
    assert reason in str(unheeded(layer, mask, wanted))


PROGRAM = """
import os, sys
from distily.vllm_plugin import register
before = list(sys.meta_path)
register()
assert sys.meta_path == before, "another program's vLLM was changed"
os.environ["DISTILY_DRIVER_PID"] = str(os.getpid())
register()
register()
ours = [type(one) for one in sys.meta_path if type(one).__module__ == "pipeline.capture.stand_in"]
assert len(ours) == 1, "another one for each call, or none"
from torchvision.transforms.v2 import functional
import torchvision.io
from transformers.utils import is_torchvision_available
assert not is_torchvision_available(), "transformers would use it"
mode = functional.InterpolationMode.BICUBIC
class Transform(torchvision.transforms.Compose): pass
try:
    functional.resize(1)
except ImportError as error:
    assert "torchvision is not installed" in str(error)
else:
    raise AssertionError
from transformers.models.gemma3.image_processing_gemma3 import Gemma3ImageProcessor
"""


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed: no stand-in")
def test_the_stand_in_is_imported_and_never_used() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
