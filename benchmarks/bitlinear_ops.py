"""How many kernels do a BitLinear and its optimizer launch on a GPU, and how many bytes do they move?

They are counted, on a CPU, so they say nothing about time. "plain" is what runs without Triton: operations
that torch dispatches and that are neither views nor allocations, for each of which a GPU launches a kernel.
"kernels" are those of student/bitnet/chains_triton.py, counted where they would be launched, and the
operations between them. Bytes are those of the tensors that each reads and writes. Products are those of a
GPU, with the copies that cuBLAS wants. Sizes are those of projections of SmolLM2-135M with 2,048 tokens.
Loss, attention and norms are not counted. Needs Triton, and nothing in run/.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from common import table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from student import bitnet
from student.bitnet import BitLinear, backward, chains_triton, linear, shared_input
from student.bitnet import chains as chains_module
from student.bitnet.backward import Gate, Gates
from student.bitnet.chains import PLAIN, Chains
from student.bitnet.chains_triton import KERNELS
from student.bitnet.int_mm import aligned

TOKENS, WIDTH, KV, INNER = 2048, 576, 192, 1536
ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty")
CHAINS = {"plain": PLAIN, "kernels": KERNELS}


class Counter(TorchDispatchMode):
    """Launches, and the bytes of their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket.__name__ in ("mm", "_int_mm"):  # values of a product say nothing here
            a, b = args
            dtype = torch.int32 if a.dtype == torch.int8 else a.dtype
            found = torch.empty(a.shape[0], b.shape[1], dtype=dtype)
        else:
            found = func(*args, **(kwargs or {}))
        allocates = func.overloadpacket.__name__ in ALLOCATIONS
        if func.namespace == "aten" and not func.is_view and not allocates:  # no profiler's marks
            inputs = {id(t): t for t in tree_leaves((args, kwargs or {})) if isinstance(t, Tensor)}
            # What is written in place is an input, too, and counted as both.
            self.add([*inputs.values(), *tree_leaves(found)])
        return found

    def add(self, tensors: list[Any]) -> None:
        """One launch that reads or writes each of them."""
        self.launches += 1
        self.bytes += sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))

    def launch(self, kernel: Any, grid: Any, *arguments: Any, **constants: Any) -> None:
        """In place of a kernel's: what it would write is never read for its values."""
        self.add(list(arguments))


def int_mm(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """As on a GPU."""
    return torch._int_mm(*aligned(a_MK, b_KN))[:, : b_KN.shape[1]]


@contextmanager
def gpu(chains: Chains, integers: bool) -> Iterator[None]:
    """Layers take these chains and products."""

    def given(_: Tensor) -> Chains:
        return chains

    with (
        patch.object(chains_module, "on_cpu", lambda _: False),
        patch.object(linear, "chains", given),
        patch.object(backward, "chains", given),
        patch.object(shared_input, "chains", given),
        patch.object(linear, "is_integer", lambda *_: integers),
        patch.object(linear, "int_mm", int_mm),
        patch.object(backward, "int_mm", int_mm),
        patch.object(backward, "block_size", lambda _: 4096),
    ):
        yield


@contextmanager
def counting() -> Iterator[Counter]:
    """What is launched inside."""
    with Counter() as counter, patch.object(chains_triton, "launch", counter.launch):
        yield counter


def autocast(dtype: torch.dtype) -> torch.autocast:
    """To bfloat16, or none."""
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)


@dataclass(frozen=True)
class Form:
    """Of training: what is multiplied, and how far quantisation has risen."""

    name: str
    integers: bool = False
    int8_backward: bool = False
    strengths: bitnet.Strengths = bitnet.FULL


FORMS = (
    Form("int8 products, full backward", integers=True),
    Form("int8 products, int8 backward", integers=True, int8_backward=True),
    Form("floating-point products", integers=False),
    Form("warm-up", strengths=bitnet.Strengths(0.5, 0.5, 1)),
)


def passes(form: Form, dtype: torch.dtype, chains: Chains) -> list[Counter]:
    """Forward of the first projection of an input with a weight that changed, forward of a further one whose
    weight is kept, and backward of that.
    """
    first, further = (BitLinear(WIDTH, INNER, bias=False) for _ in range(2))
    for layer in (first, further):
        layer.strengths = form.strengths
        if form.int8_backward:
            layer.gates = Gates(Gate(False, 1.0), Gate(False, 1.0))
    bitnet.quantize_once(further)
    further.quantized()
    x, counters = torch.randn(TOKENS, WIDTH, requires_grad=True), []
    with gpu(chains, form.integers):
        for layer in (first, further):
            with (
                torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16),
                counting() as counter,
            ):
                y = layer(x)
            counters.append(counter)
        direction = torch.ones_like(y)
        with counting() as counter:
            torch.autograd.grad(y, [x, further.weight], direction)
    return [*counters, counter]


def layer_tables() -> str:
    """Launches, and bytes per element of the input, of one projection."""
    launches, moved = [], []
    for form in FORMS:
        for dtype in (torch.float32, torch.bfloat16):
            name = f"{form.name}, {str(dtype).removeprefix('torch.')}"
            both = [passes(form, dtype, chains) for chains in CHAINS.values()]
            pairs = list(zip(*both, strict=True))
            launches.append([name, *(str(c.launches) for pair in pairs for c in pair)])
            moved.append([name, *(f"{c.bytes / (TOKENS * WIDTH):.0f}" for pair in pairs for c in pair)])
    columns = [
        f"{which}, {chains}"
        for which in ("forward, first", "forward, further", "backward")
        for chains in CHAINS
    ]
    return (
        table(["launches of a projection", *columns], launches)
        + "\n"
        + table([f"bytes per input element, {WIDTH} to {INNER}", *columns], moved)
    )


def chain_table() -> str:
    """Of each chain alone."""
    x, weight = torch.randn(TOKENS, WIDTH), torch.randn(INNER, WIDTH)
    sums, inverse = torch.ones(TOKENS, INNER, dtype=torch.int32), torch.ones(TOKENS, 1)
    ints, scale = torch.ones(TOKENS, WIDTH, dtype=torch.int8), torch.tensor(0.1)
    grad = torch.ones(TOKENS, INNER)
    calls: dict[str, tuple[Tensor, Callable[[Chains], Any]]] = {
        "activations to int8": (x, lambda c: c.quantize_rows(x, None)),
        "weight to ternary": (weight, lambda c: c.quantize_weight(weight)),
        "sums to bfloat16 outputs": (sums, lambda c: c.rescale(sums, inverse, scale, None, torch.bfloat16)),
        "blended activations": (x, lambda c: c.blend_rows(x, ints, inverse, 0.5, torch.bfloat16)),
        "dY in int8 by token": (grad, lambda c: c.gradient_rows(grad)),
        "dY in int8 by output": (grad, lambda c: c.gradient_columns(grad, inverse)),
        "sums to dX": (sums, lambda c: c.rescale_gradient(sums, inverse, scale, torch.bfloat16)),
    }
    rows = []
    for name, (of, call) in calls.items():
        row = [name]
        for chains in CHAINS.values():
            with torch.no_grad(), gpu(chains, integers=True), counting() as counter:
                call(chains)
            row += [str(counter.launches), f"{counter.bytes / of.numel():.1f}"]
        rows.append(row)
    header = ["launches, plain", "bytes per element", "launches, kernels", "bytes per element"]
    return table(["chain", *header], rows)


def decoder_layer() -> str:
    """Of the seven projections of a decoder layer and their four inputs, weights quantised before."""
    shapes = {
        "q": ("hidden", WIDTH, WIDTH),
        "k": ("hidden", WIDTH, KV),
        "v": ("hidden", WIDTH, KV),
        "o": ("attended", WIDTH, WIDTH),
        "gate": ("normed", WIDTH, INNER),
        "up": ("normed", WIDTH, INNER),
        "down": ("activated", INNER, WIDTH),
    }
    rows = []
    for form in FORMS[:3]:
        for dtype in (torch.float32, torch.bfloat16):
            row = [f"{form.name}, {str(dtype).removeprefix('torch.')}"]
            for chains in CHAINS.values():
                for counter in _seven(form, dtype, chains, shapes):
                    row += [f"{counter.launches} ({counter.launches / 7:.1f})"]
                    row += [f"{counter.bytes / (TOKENS * (3 * WIDTH + INNER)):.0f}"]
            rows.append(row)
    columns = [
        f"{which}, {chains}"
        for chains in CHAINS
        for which in ("forward", "bytes forward", "backward", "bytes backward")
    ]
    return table(["seven projections (per BitLinear)", *columns], rows)


def _seven(
    form: Form, dtype: torch.dtype, chains: Chains, shapes: dict[str, tuple[str, int, int]]
) -> tuple[Counter, Counter]:
    projections = {
        name: (x, BitLinear(inputs, outputs, bias=False)) for name, (x, inputs, outputs) in shapes.items()
    }
    bitnet.quantize_once(nn.ModuleList(layer for _, layer in projections.values()))
    inputs = {
        x: torch.randn(TOKENS, layer.in_features, requires_grad=True) for x, layer in projections.values()
    }
    for _, layer in projections.values():
        layer.quantized()
        if form.int8_backward:
            layer.gates = Gates(Gate(False, 1.0), Gate(False, 1.0))
    weights = [layer.weight for _, layer in projections.values()]
    with gpu(chains, form.integers):
        with autocast(dtype), counting() as forward:
            outputs = [layer(inputs[x]) for x, layer in projections.values()]
        directions = [torch.ones_like(output) for output in outputs]
        with counting() as back:
            torch.autograd.grad(outputs, [*inputs.values(), *weights], directions)
    return forward, back


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


def main() -> None:
    """Print the tables."""
    torch.manual_seed(0)
    print(layer_tables())
    print(chain_table())
    print(decoder_layer())
    print(optimizer())


if __name__ == "__main__":
    main()
