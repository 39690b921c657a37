"""The vLLM plug-in: makes a capturing twin of every decoder architecture known by name.

vLLM calls `register` in each of its processes (entry point group `vllm.general_plugins`), before it loads a
model. Nothing heavy is imported: a twin is built by `pipeline.capture.model` when vLLM asks for it.
"""

from __future__ import annotations

from pipeline.capture.watch import end_with_driver

PREFIX = "DistilyCapture_"


def capture_name(architecture: str) -> str:
    """The registry name of the capturing twin of `architecture`."""
    return PREFIX + architecture


def register() -> None:
    from vllm import ModelRegistry

    end_with_driver()
    known = frozenset(ModelRegistry.get_supported_archs())
    for architecture in known:
        name = capture_name(architecture)
        if architecture.endswith("ForCausalLM") and name not in known:
            ModelRegistry.register_model(name, f"pipeline.capture.model:{name}")
