"""Where Triton looks for a backend's compiler: the one class here."""

from __future__ import annotations

from typing import Any, NoReturn

from triton.backends import compiler


class CpuCompiler(compiler.BaseBackend):
    @staticmethod
    def supports_target(target: Any) -> bool:
        return bool(target.backend == "cpu")

    def _nothing_is_compiled(self, *_: Any) -> NoReturn:
        raise NotImplementedError("kernels are interpreted: set TRITON_INTERPRET=1")

    hash = parse_options = add_stages = load_dialects = get_module_map = _nothing_is_compiled
