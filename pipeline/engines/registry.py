"""The engines that `--engine` may name: two of ours, and those that were registered."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from distily.plugins import load_plugins
from pipeline.engines.base import Engine, EngineConfig
from pipeline.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class EngineEntry:
    """How an engine is had.

    start: loads the teacher of a configuration; the flag is --verbose. version: of what computes, kept in the
    store; RequestError where it is not installed.
    """

    start: Callable[[EngineConfig, bool], Engine]
    version: Callable[[], str]


def _start_vllm(config: EngineConfig, verbose: bool) -> Engine:
    from pipeline.engines.vllm_engine import VllmEngine

    return VllmEngine(config, verbose)


def _vllm_version() -> str:
    from pipeline.engines import vllm_engine

    return vllm_engine.version()


def _start_transformers(config: EngineConfig, verbose: bool) -> Engine:
    from pipeline.engines.transformers_engine import TransformersEngine

    return TransformersEngine(config)


def _transformers_version() -> str:
    try:
        import transformers
    except ImportError as error:
        raise RequestError("--engine transformers: not installed; install the extra [train]") from error
    return str(transformers.__version__)


_OURS = {
    "vllm": EngineEntry(start=_start_vllm, version=_vllm_version),
    "transformers": EngineEntry(start=_start_transformers, version=_transformers_version),
}
_registered: dict[str, EngineEntry] = {}


def register_engine(
    name: str, start: Callable[[EngineConfig, bool], Engine], version: Callable[[], str]
) -> None:
    """Make an engine known as `--engine NAME`.

    Args:
        name: what the flag takes, and the store keeps.
        start: loads the teacher and returns an object with the methods of `Engine`: `capture`, which yields
            the features of each prompt, and `close`.
        version: of what computes; a store is only extended by the engine that it was made with.

    Raises:
        ValueError: there is one of that name, or it is no word of letters, digits, _ and -.

    Example:
        register_engine("mine", lambda config, verbose: MyEngine(config), lambda: my_package.__version__)
    """
    if name in _OURS or name in _registered:
        raise ValueError(f"an engine named {name!r} exists already")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise ValueError(f"{name!r} is no name of an engine; take letters, digits, _ and -")
    _registered[name] = EngineEntry(start=start, version=version)


def find_engine(name: str) -> EngineEntry:
    """The engine of that name; RequestError where there is none, PluginError where a plugin fails."""
    if name not in _OURS:
        load_plugins()
    engines = _OURS | _registered
    if name not in engines:
        raise RequestError(f"--engine {name}: choose one of {', '.join(engines)}")
    return engines[name]
