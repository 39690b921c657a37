"""A stand-in for torchvision, in vLLM's processes, where torchvision is not installed.

vLLM's multimodal classes import transformers' image processors, and these import torchvision with their first
lines. A teacher that is given text only never calls any of it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NoReturn

_NAME = "torchvision"


def stand_in_for_torchvision() -> None:
    """Let imports of torchvision succeed from now on; a no-op where it is installed, or done already."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path) or find_spec(_NAME) is not None:
        return
    from transformers.utils import is_torchvision_available

    # Asked now, because the answer is kept: who asks first is told that it is missing, and uses Pillow.
    is_torchvision_available()
    sys.meta_path.append(_Finder())


class _Absent(type):
    """The type of what stands for all that torchvision has: every attribute is there, none can be called."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls

    def __call__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise ImportError("torchvision is not installed, and the capture of text needs none of it")


class _Anything(metaclass=_Absent):
    pass


class _Module(ModuleType):
    def __getattr__(self, name: str) -> Any:
        return getattr(_Anything, name)


class _Finder(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] != _NAME:
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass
