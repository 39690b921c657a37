"""What this machine is called, which floating-point type it multiplies fastest, and code compiled for it.

Processors differ more in bfloat16 than in anything else: with AMX or AVX-512 its matrix products are up to
twice as fast as those of float32, with AVX2 alone several times slower. The choice is therefore measured, by
a product that the caller supplies (nothing here imports a tensor library), and remembered per machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

CACHE_VARIABLE = "DISTILY_CACHE_DIR"
_COMPILED = "TORCHINDUCTOR_CACHE_DIR"  # torch's own variable
# A type has to be this much slower than float32 before float32, which takes twice the memory, replaces it.
WORTHWHILE = 1.25
_ROUNDS = 4
# Variables that make a processor behave as a smaller one; what is remembered holds for their values only.
_ISA_VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "DNNL_MAX_CPU_ISA",
    "MKL_ENABLE_INSTRUCTIONS",
    "ONEDNN_MAX_CPU_ISA",
)
_MAX_BYTES = 4096


def cpu_name() -> str:
    """The processor's own name where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def cache_directory() -> Path:
    """Where copies and measurements are kept that may be deleted at any time."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "distily-cache")


def product_seconds(dtypes: Sequence[str], product: Callable[[str], object], where: str) -> dict[str, float]:
    """Seconds of one `product(dtype)` for each of `dtypes`, measured once per machine.

    The types take turns and the least time of each counts, so that a busy machine slows all of them alike.

    Args:
        dtypes: names that `product` understands, e.g. `float32` and `bfloat16`.
        product: multiplies two matrices of that type and waits for the result.
        where: the library, its version and the device that multiply; part of what the result is kept under.

    Example: `product_seconds(("float32", "bfloat16"), product, "torch 2.13.0 cpu")`
    """
    key = _digest([cpu_name(), _instruction_sets(), os.cpu_count(), where, list(dtypes)])
    file = cache_directory() / f"speed-{key}.json"
    known = _read(file)
    if set(known) == set(dtypes):
        return known
    for dtype in dtypes:
        product(dtype)  # the first one starts threads and chooses a kernel
    best = dict.fromkeys(dtypes, float("inf"))
    for _ in range(_ROUNDS):
        for dtype in dtypes:
            began = time.perf_counter()
            product(dtype)
            best[dtype] = min(best[dtype], time.perf_counter() - began)
    _write(file, best)
    return best


def fast_dtype(saved: str, seconds: Mapping[str, float]) -> str:
    """`saved`, or float32 where its products are faster by more than WORTHWHILE.

    seconds: of the same product in float32 and in `saved`, as `product_seconds` measures them.
    """
    return "float32" if seconds["float32"] * WORTHWHILE < seconds[saved] else saved


def separate_compiled_code() -> None:
    """Have torch keep what it compiles for the CPU in a directory for these instruction sets alone.

    Its cache does not tell them apart: what was written for AVX-512 is found again by a process that builds
    it for AVX2, on another machine that shares the directory or under ATEN_CPU_CAPABILITY, and then computes
    wrong numbers (torch 2.13; seen in both directions). Comes before anything is compiled; processes that are
    started afterwards inherit it.
    """
    name = f"isa-{_digest(_instruction_sets())[:12]}"
    folder = Path(os.environ.get(_COMPILED) or Path(tempfile.gettempdir()) / f"torchinductor_{os.getuid()}")
    if folder.name != name:
        os.environ[_COMPILED] = str(folder / name)


def _digest(known: object) -> str:
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:32]


def _instruction_sets() -> list[str]:
    """Those of the processor, and what the environment makes of them."""
    return [_flags(), *(f"{name}={os.environ.get(name, '')}" for name in _ISA_VARIABLES)]


def _flags() -> str:
    """The instruction sets that Linux lists; a virtual machine may hide some of what the name promises."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("flags")), "")


def _read(file: Path) -> dict[str, float]:
    """What was measured before; empty where there is nothing that can be read."""
    try:
        with file.open("rb") as stream:
            found = json.loads(stream.read(_MAX_BYTES))
        return {str(name): float(value) for name, value in found.items() if float(value) > 0}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write(file: Path, seconds: Mapping[str, float]) -> None:
    """Whole or not at all; where nothing can be written it is measured again next time."""
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, encoding="utf-8") as stream:
            json.dump(dict(seconds), stream)
        Path(stream.name).replace(file)
