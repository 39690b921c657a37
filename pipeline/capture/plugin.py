"""The vLLM plug-in: a capturing twin takes the place of the teacher's class, in the engine's processes only.

vLLM loads `distily.vllm_plugin` in each of its processes, which calls `register` in ours. The twin goes by
the architecture's own name, because vLLM keys settings on that name. Nothing heavy is imported: the twin is
built by `pipeline.capture.model` when vLLM asks for it.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable
from typing import Any

from pipeline.capture.stand_in import stand_in_for_torchvision
from pipeline.capture.watch import end_with_driver

PREFIX = "DistilyCapture_"
# vLLM's wrapper around transformers' classes ("Transformers modeling backend") goes by these names, of which
# vLLM picks one by itself.
WRAPPERS = (
    "TransformersForCausalLM",
    "TransformersMoEForCausalLM",
    "TransformersMultiModalForCausalLM",
    "TransformersMultiModalMoEForCausalLM",
)
# Set by the engine and inherited by its processes.
_VARIABLE = "DISTILY_CAPTURE"
_originals: dict[str, Any] = {}


def capture_from(architectures: Iterable[str]) -> None:
    """In the command: tell `register`, here and in vLLM's processes, which architectures to capture."""
    os.environ[_VARIABLE] = ",".join(architectures)


def register() -> None:
    """Called in each process of a capture's engine, by `distily.vllm_plugin`, and by the command."""
    end_with_driver()
    # vLLM collects garbage several times while an engine starts. What is loaded by now stays, and looking
    # through its millions of objects would take a second each time.
    gc.freeze()
    stand_in_for_torchvision()
    for architecture in filter(None, os.environ.get(_VARIABLE, "").split(",")):
        _register_twin(architecture)


def _register_twin(architecture: str) -> None:
    from vllm import ModelRegistry

    if architecture in ModelRegistry.models and architecture not in _originals:
        _originals[architecture] = ModelRegistry.models[architecture]
        ModelRegistry.register_model(architecture, f"pipeline.capture.model:{PREFIX}{architecture}")


def original(architecture: str) -> Any:
    """vLLM's own entry of the registry, also where the twin has taken its place."""
    from vllm import ModelRegistry

    return _originals.get(architecture) or ModelRegistry.models[architecture]
