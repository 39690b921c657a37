"""Which class of vLLM runs a teacher: one of its own, or its wrapper around transformers' class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from distily import vllm_plugin
from distily.text import one_line
from pipeline.capture.plugin import WRAPPERS, capture_from, original, register
from pipeline.engines.plain_head import has_plain_head
from pipeline.errors import RequestError
from pipeline.teacher.model_class import auto_class

_OTHER_ENGINE = "use --engine transformers"


@dataclass(frozen=True, kw_only=True)
class VllmModel:
    """wrapped: it is transformers' class in vLLM's wrapper. has_states: layers keep recurrent states, beside
    keys and values or instead of them.
    """

    wrapped: bool
    has_states: bool


def find_in_vllm(architecture: str, config: Any) -> VllmModel:
    """Make sure that this vLLM can run the architecture, and have it captured.

    config: transformers' configuration of the checkpoint.

    Raises:
        RequestError: vLLM cannot, or what it gave would not be the teacher's logits.
    """
    from vllm import ModelRegistry
    from vllm.plugins import DEFAULT_PLUGINS_GROUP, load_plugins_by_group

    if vllm_plugin.register not in load_plugins_by_group(DEFAULT_PLUGINS_GROUP).values():
        raise RequestError(
            "--engine vllm: the capture plug-in is not registered; install distily-cache as a package "
            "(pip install -e .) and leave `distily_cache` in VLLM_PLUGINS if that variable is set"
        )
    known = architecture in ModelRegistry.models
    wrapped = not known or getattr(original(architecture), "class_name", None) in WRAPPERS
    if wrapped:
        _check_wrapped(architecture, config)
    capture_from((architecture,) if known else WRAPPERS)
    register()
    try:
        facts = ModelRegistry.models[architecture if known else WRAPPERS[0]].inspect_model_cls()
    except Exception as error:
        raise RequestError(
            f"--engine vllm: vLLM cannot load its {architecture} here ({_reason(error)}); install what is "
            f"missing, or {_OTHER_ENGINE}"
        ) from error
    if not facts.is_text_generation_model:
        raise RequestError(f"--engine vllm: {architecture} is not a language model in vLLM; {_OTHER_ENGINE}")
    has_states = facts.has_inner_state or facts.is_hybrid or facts.is_attention_free
    return VllmModel(wrapped=wrapped, has_states=has_states)


def _check_wrapped(architecture: str, config: Any) -> None:
    """RequestError unless vLLM's wrapper gives what transformers' class of that name gives."""
    import transformers

    unknown = f"--engine vllm: this vLLM does not know {architecture} by itself"
    known = getattr(transformers, architecture, None)
    if known is None or not known.is_backend_compatible():
        raise RequestError(f"{unknown}, and cannot wrap transformers' class; {_OTHER_ENGINE}")
    if auto_class(config) is not transformers.AutoModelForCausalLM:
        raise RequestError(f"{unknown}, and wraps no multimodal class for text alone; {_OTHER_ENGINE}")
    if not has_plain_head(known, config):
        raise RequestError(
            f"{unknown}, and its wrapper leaves out what transformers' class does behind the LM head; "
            f"{_OTHER_ENGINE}"
        )


def _reason(error: BaseException) -> str:
    """The line of the error that vLLM's process, which looked at the class, ended with."""
    text = str(error).strip()
    return one_line(Exception(text.splitlines()[-1])) if text else one_line(error)
