"""The vLLM plug-in: a capturing twin takes the place of the teacher's class, in the engine's processes only.

vLLM calls `register` in each of its processes (entry point group `vllm.general_plugins`). The twin goes by
the architecture's own name, because vLLM keys settings on that name. Nothing heavy is imported: the twin is
built by `pipeline.capture.model` when vLLM asks for it.
"""

from __future__ import annotations

import os
from typing import Any

from pipeline.capture.watch import end_with_driver

PREFIX = "DistilyCapture_"
# Set by the engine and inherited by its processes; in any other vLLM process the plug-in does nothing.
_VARIABLE = "DISTILY_CAPTURE"
_originals: dict[str, Any] = {}


def capture_from(architecture: str) -> None:
    """In the command: tell `register`, here and in vLLM's processes, which architecture to capture."""
    os.environ[_VARIABLE] = architecture


def register() -> None:
    end_with_driver()
    architecture = os.environ.get(_VARIABLE)
    if architecture is None or architecture in _originals:
        return
    from vllm import ModelRegistry

    if architecture in ModelRegistry.models:
        _originals[architecture] = ModelRegistry.models[architecture]
        ModelRegistry.register_model(architecture, f"pipeline.capture.model:{PREFIX}{architecture}")


def original(architecture: str) -> Any:
    """vLLM's own entry of the registry, also where the twin has taken its place."""
    from vllm import ModelRegistry

    return _originals.get(architecture) or ModelRegistry.models[architecture]
