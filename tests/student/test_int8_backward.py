"""Integer products, the int8 backward pass made of them, and the gates that let it through."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from student import bitnet
from student.bitnet import BitLinear, backward, int_mm, linear
from student.bitnet.backward import Gate, Gates, block_size
from student.bitnet.int_mm import aligned, suits, works
from tests.student.test_training import BITNET, logs, weights

Train = Callable[..., dict[str, Any]]
SIZES = (1, 2, 7, 16, 17, 33)
BLOCK = block_size("cpu")


def ints(*shape: int, largest: int = 127) -> Tensor:
    return torch.randint(-largest - 1, largest + 1, shape, dtype=torch.int8)


def layouts(x: Tensor) -> list[Tensor]:
    """The same matrix in rows, in columns, and as a part of a larger one."""
    wide = torch.zeros(x.shape[0] + 1, x.shape[1] + 3, dtype=x.dtype, device=x.device)
    wide[1:, 2:-1] = x
    return [x, x.t().contiguous().t(), wide[1:, 2:-1]]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_integer_products_are_exact(device: str) -> None:
    """In every layout and at sizes of 1, and where sums are largest."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    torch.manual_seed(0)
    for rows, inner, columns in itertools.product(SIZES, SIZES, SIZES):
        a, b = ints(rows, inner), ints(inner, columns)
        right = a.long() @ b.long()
        for x, y in itertools.product(layouts(a.to(device)), layouts(b.to(device))):
            assert torch.equal(int_mm(x, y).cpu().long(), right), (rows, inner, columns)
    a, b = torch.full((19, 1023), -128, dtype=torch.int8), torch.full((1023, 18), 127, dtype=torch.int8)
    assert torch.equal(int_mm(a.to(device), b.to(device)).cpu().long(), a.long() @ b.long())


def test_who_multiplies_integers() -> None:
    assert [suits("cuda", rows, 33, 7) for rows in (1, 16, 17)] == [False, False, True]
    assert [suits("cpu", *sizes) for sizes in ((2, 2, 2), (1, 9, 9), (9, 1, 9), (9, 9, 1))] == [
        True,
        True,
        False,
        True,
    ]
    assert suits("cpu", 9, 131_072, 9)
    assert not suits("cuda", 99, 131_073, 9)  # a sum of 128 * 128 each does not fit 32 bits
    assert not suits("mps", 99, 99, 99)


@pytest.mark.parametrize(("inner", "columns"), [(5, 3), (8, 16), (9, 8)])
def test_operands_are_laid_out_for_cublas(inner: int, columns: int) -> None:
    a, b = ints(18, inner).t().contiguous().t(), ints(inner, columns)
    x, y = aligned(a, b)
    assert x.is_contiguous()
    assert y.t().is_contiguous()
    assert [size % 8 for size in (x.shape[1], *y.shape)] == [0, 0, 0]
    assert torch.equal((x.long() @ y.long())[:, :columns], a.long() @ b.long())


def test_cpus_that_multiply_integers_wrongly_are_found_out() -> None:
    """Without VNNI pairs of products saturate at 16 bits; oneDNN can be told to do without."""
    path = Path(linear.__file__).with_name("int_mm.py")
    script = f"""
import importlib.util, torch
spec = importlib.util.spec_from_file_location("int_mm", {str(path)!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
a = torch.full((20, 30), 127, dtype=torch.int8)
assert not module.works("cpu")
assert bool((module.int_mm(a, a.t()) == 30 * 127**2).all())
"""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)


@pytest.mark.skipif(not works("cpu"), reason="needs a CPU with VNNI")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_integer_forward_is_the_other_ones_exact_sum(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 to the bit, as sums of 577 products are exact either way. In bfloat16 it is rounded once
    (by 2^-8 at most), where the floating-point product's sum is rounded before.
    """
    torch.manual_seed(0)
    layer, x = BitLinear(577, 35), torch.randn(3, 21, 577).to(dtype)
    layer.bias.data.zero_()
    ternary, scale = layer.quantized()
    tokens, token_scale = bitnet.quantize_activation(x)
    exact = tokens.double() @ ternary.double().t() * token_scale.double() * scale.double()
    own = layer(x)
    monkeypatch.setattr(linear, "is_integer", lambda *_: False)
    other = layer(x)
    if dtype == torch.float32:
        assert torch.equal(own, other)
    bound = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-22
    assert bool(((own - exact).abs() <= bound * 1.0001 * exact.abs()).all())
    assert own.dtype == other.dtype == dtype


def operands(tokens: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dY whose tokens differ by orders of magnitude, ternary weights and their scale, activations and the
    inverse of theirs.
    """
    torch.manual_seed(0)
    grad_NO = torch.randn(tokens, outputs) * 10.0 ** torch.randint(-6, 1, (tokens, 1))
    ternary_OI = torch.randint(-1, 2, (outputs, inputs), dtype=torch.int8)
    return grad_NO, ternary_OI, torch.tensor(0.037), ints(tokens, inputs), 1 / (torch.rand(tokens, 1) + 0.01)


def test_blocks_are_small_on_cpus_and_large_on_gpus() -> None:
    assert [block_size(kind) for kind in ("cpu", "mps", "cuda")] == [256, 256, 4096]


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("sizes", [(1, 3, 5), (67, 33, 9), (2 * BLOCK + 45, 31, 17), (4096 + 33, 7, 5)])
def test_products_are_as_near_as_rounding_to_int8_lets_them(
    sizes: tuple[int, int, int], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the blocks of either device. Each rounded value is off by half a step (maximum / 127) at most;
    1e-5 of all that is summed up is for float32.
    """
    block = block_size(kind)
    monkeypatch.setattr(backward, "block_size", lambda _kind: block)
    grad_NO, ternary_OI, weight_scale, ints_NI, inverse_N1 = operands(*sizes)
    wide, ternary, acts = grad_NO.double(), ternary_OI.double(), ints_NI.double()
    exact = wide @ ternary * weight_scale.double()
    size = wide.abs() @ ternary.abs() * weight_scale
    step_N1 = wide.abs().amax(1, keepdim=True) / 127
    bound = weight_scale * step_N1 / 2 * ternary.abs().sum(0) + 1e-5 * size
    found = backward.int8_input_gradient(grad_NO, ternary_OI, weight_scale, torch.float32)
    assert bool(((found - exact).abs() <= bound).all())

    scaled = wide / inverse_N1.double()
    exact = scaled.t() @ acts
    bound = 1e-5 * scaled.abs().t() @ acts.abs()
    for part, some in zip(scaled.split(block), acts.split(block), strict=True):
        bound += part.abs().amax(0)[:, None] / 127 / 2 * some.abs().sum(0)
    found = backward.int8_weight_gradient(grad_NO, ints_NI, inverse_N1)
    assert bool(((found - exact).abs() <= bound).all())


def test_nothing_stays_nothing_and_what_is_not_finite_is_seen() -> None:
    """A scaler of float16 gradients looks for infinities."""
    grad_NO, ternary_OI, weight_scale, ints_NI, inverse_N1 = operands(20, 33, 9)
    nothing = torch.zeros_like(grad_NO)
    assert not backward.int8_input_gradient(nothing, ternary_OI, weight_scale, torch.float32).any()
    assert not backward.int8_weight_gradient(nothing, ints_NI, inverse_N1).any()
    for bad in (torch.inf, torch.nan):
        grad_NO[3, 4] = bad
        assert (
            not backward.int8_input_gradient(grad_NO, ternary_OI, weight_scale, torch.float32)[3]
            .isfinite()
            .any()
        )
        assert not backward.int8_weight_gradient(grad_NO, ints_NI, inverse_N1)[4].isfinite().any()
        gate, full = Gate(), torch.ones(2)
        assert gate.choose(lambda x, bad=bad: x * bad, lambda x: x, full) is full
        assert not gate.open


def gradients(layer: BitLinear, x: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    layer.zero_grad()
    layer(x).backward(direction)
    assert x.grad is not None
    assert layer.weight.grad is not None
    return x.grad, layer.weight.grad.clone()


def test_a_layer_falls_back_where_int8_bends_its_gradient_until_it_is_compared_again() -> None:
    """One output outshines 1,999 others in every token: they round to zero in dX, whose scale they share, and
    not in dW.
    """
    torch.manual_seed(0)
    layer, x = BitLinear(64, 2000, bias=False), torch.randn(30, 64)
    tame = torch.randn(30, 2000)
    wild = tame.clone()
    wild[:, 0] = 300
    full = {name: gradients(layer, x, direction) for name, direction in (("tame", tame), ("wild", wild))}
    layer.gates = Gates()

    def paths(name: str) -> tuple[bool, bool]:
        """Whether dX and dW are the full ones, by value."""
        found = gradients(layer, x, tame if name == "tame" else wild)
        for own, right in zip(found, full[name], strict=True):
            assert backward.cosine(own, right) >= 0.999 or name == "wild"
        return torch.equal(found[0], full[name][0]), torch.equal(found[1], full[name][1])

    assert paths("tame") == (False, False)
    assert paths("wild") == (True, False)
    assert layer.gates.inputs.cosine is not None and layer.gates.inputs.cosine < 0.999
    layer.gates.inputs.check(False)
    layer.gates.weights.check(False)
    assert paths("tame") == (True, False)  # the lowest of a step's passes counts
    for now in (True, False):
        layer.gates.inputs.check(now)
        layer.gates.weights.check(now)
        assert paths("tame") == (False, False)


STEPS = ("--max_steps", 10, "--logging_steps", 1, "--save_strategy", "steps", "--save_steps", 7, "--bf16")
HARD = ("--gradient-accumulation-steps", 2, "--gradient_checkpointing", "--eval_strategy", "no")
LATE = ("--bitnet-warmup-weights", 0.5, "--learning-rate", 0.005)


def test_trainings_in_int8_compare_themselves_and_go_on_where_they_stopped(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are on their way for 5 steps: layers are compared in the first pass that multiplies integers.
    Forced back everywhere, the same flags give the full training to the bit.
    """
    flags = (*BITNET, "--bitnet-conversion", "subln", *STEPS, *HARD, *LATE)
    int8 = (*flags, "--bitnet-backward", "int8")
    train(tmp_path / "int8", *int8)
    entries = [log for log in logs(tmp_path / "int8") if "loss" in log]
    assert ["bitnet_backward_cosine_min" in log for log in entries] == [False] * 5 + [True] * 5
    assert all(0.999 <= log["bitnet_backward_cosine_min"] < 0.999999 for log in entries[5:])
    assert {log["bitnet_backward_fallbacks"] for log in entries[5:]} == {0}

    train(tmp_path / "resumed", *int8, "--resume_from_checkpoint", tmp_path / "int8" / "checkpoint-7")
    one, resumed = weights(tmp_path / "int8"), weights(tmp_path / "resumed")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in one.items())
    again = [log for log in logs(tmp_path / "resumed") if "loss" in log]
    assert again[7]["bitnet_backward_cosine_min"] != entries[7]["bitnet_backward_cosine_min"]

    train(tmp_path / "full", *flags)
    full = weights(tmp_path / "full")
    assert not any("bitnet_backward_fallbacks" in log for log in logs(tmp_path / "full"))
    assert any(not torch.equal(tensor, full[name]) for name, tensor in one.items())

    monkeypatch.setattr(backward, "LOWEST", 2.0)
    train(tmp_path / "shut", *int8)
    shut = weights(tmp_path / "shut")
    assert all(torch.equal(tensor, full[name]) for name, tensor in shut.items())
    last = [log for log in logs(tmp_path / "shut") if "loss" in log][-1]
    assert last["bitnet_backward_fallbacks"] == 2 * 14


def test_full_precision_students_have_no_int8_backward(
    refused: Callable[..., str], cache: Path, tmp_path: Path
) -> None:
    line = refused("from-cache", cache, "--output-dir", tmp_path, "--bitnet-backward", "int8")
    assert "--bitnet-backward has no effect on a student in full precision; add --student-model-as" in line
