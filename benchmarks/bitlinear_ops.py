"""How many operations do a BitLinear and its optimizer launch, and how many bytes do they move?

Operations are those that torch dispatches and that are no views, bytes those of the tensors that they read
and write. They are counted, on a CPU, so they say nothing about time; a GPU launches a kernel for each. Sizes
are those of a decoder layer of SmolLM2-135M with 2,048 tokens. "int8 units" multiplies as a GPU does, with
torch._int_mm. Weights were quantised before, as they are once per training step. Loss, attention and norms
are not counted. `--compiled` also compiles the two chains of elementwise operations (needs a C++ compiler)
and counts their kernels.

Needs nothing in run/. Of an older checkout: `PYTHONPATH=<checkout> python benchmarks/bitlinear_ops.py`.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from common import table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from student import bitnet
from student.bitnet import BitLinear, linear

TOKENS, WIDTH, KV, INNER = 2048, 576, 192, 1536


class Counter(TorchDispatchMode):
    """Operations that are no views, and the bytes of their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if func.namespace == "aten" and not func.is_view:  # no profiler's marks
            self.launches += 1
            inputs = {id(t): t for t in tree_leaves((args, kwargs or {})) if isinstance(t, Tensor)}
            # What is written in place is an input, too, and counted as both.
            for tensor in (*inputs.values(), *tree_leaves(found)):
                self.bytes += tensor.numel() * tensor.element_size()
        return found


def layers() -> dict[str, tuple[str, BitLinear]]:
    """The projections of a decoder layer, and which input each has."""
    shapes = {
        "q": ("hidden", WIDTH, WIDTH),
        "k": ("hidden", WIDTH, KV),
        "v": ("hidden", WIDTH, KV),
        "o": ("attended", WIDTH, WIDTH),
        "gate": ("normed", WIDTH, INNER),
        "up": ("normed", WIDTH, INNER),
        "down": ("activated", INNER, WIDTH),
    }
    return {
        name: (x, BitLinear(inputs, outputs, bias=False)) for name, (x, inputs, outputs) in shapes.items()
    }


def counted(dtype: torch.dtype) -> tuple[Counter, Counter]:
    """Of the seven projections, forward and backward."""
    projections = layers()
    bitnet.quantize_once(nn.ModuleList(layer for _, layer in projections.values()))
    inputs = {
        x: torch.randn(TOKENS, layer.in_features, requires_grad=True) for x, layer in projections.values()
    }
    for _, layer in projections.values():
        layer.quantized()
    forward, backward = Counter(), Counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16), forward:
        outputs = [layer(inputs[x]) for x, layer in projections.values()]
    directions = [torch.ones_like(output) for output in outputs]
    with backward:
        torch.autograd.grad(
            outputs, [*inputs.values(), *(layer.weight for _, layer in projections.values())], directions
        )
    return forward, backward


def counts() -> str:
    """Of the seven projections, and the bytes per element of their four distinct inputs."""
    elements = TOKENS * (3 * WIDTH + INNER)
    own = linear.is_integer, linear.int_mm
    rows = []
    for units in ("floating-point", "int8 units"):
        if units == "int8 units":
            linear.is_integer, linear.int_mm = lambda *_: True, torch._int_mm
        for dtype in (torch.float32, torch.bfloat16):
            both = counted(dtype)
            name = f"{units}, {str(dtype).removeprefix('torch.')}"
            rows.append([name, *(f"{c.launches} ({c.launches / 7:.1f})" for c in both)])
            rows[-1] += [f"{c.bytes / elements:.0f}" for c in both]
    linear.is_integer, linear.int_mm = own
    header = ["products", "launches forward (per layer)", "backward", "bytes forward per input element"]
    return table([*header, "backward"], rows)


def optimizer() -> str:
    """Of a step of RoundingAdamW behind its first, per parameter."""
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        parameter = nn.Parameter(torch.randn(WIDTH, WIDTH).to(dtype))
        parameter.grad = torch.randn_like(parameter)
        adamw = bitnet.RoundingAdamW([parameter])
        adamw.step()
        with Counter() as counter:
            adamw.step()
        name = str(dtype).removeprefix("torch.")
        rows.append([name, str(counter.launches), f"{counter.bytes / parameter.numel():.0f}"])
    return table(["RoundingAdamW, parameters in", "launches", "bytes per parameter"], rows)


def compiled() -> str:
    """Kernels that torch.compile makes of each chain, in C++."""
    from torch._inductor.utils import run_and_get_code

    from student.bitnet.chains import compile_chains

    chains, x = compile_chains(), torch.randn(TOKENS, WIDTH)
    sums, inverse = torch.ones(TOKENS, WIDTH, dtype=torch.int32), torch.ones(TOKENS, 1)
    arguments = (sums, inverse, torch.tensor(0.1), None, torch.bfloat16)
    rows = []
    for name, call in (
        ("to_int8", lambda: chains.to_int8(x)),
        ("rescale", lambda: chains.rescale(*arguments)),
    ):
        with torch.no_grad():
            _, codes = run_and_get_code(call)
        rows.append([name, str(sum(code.count("async_compile.cpp_pybinding(") for code in codes))])
    return table(["chain", "kernels"], rows)


def main() -> None:
    """Print the tables."""
    torch.manual_seed(0)
    print(counts())
    print(optimizer())
    if "--compiled" in sys.argv:
        print(compiled())


if __name__ == "__main__":
    main()
