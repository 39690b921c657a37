"""hf-bitnet: transformers loads the packed file and computes the integer reference; what it cannot hold, and
what was written wrongly, is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations import bitnet as theirs

from student import bitnet
from student.export import hf_bitnet, verify
from student.export.packing import pack, unpack
from student.export.reference import IntegerLinear, integer_linears, to_integers
from student.export.source import open_source
from student.modeling.saving import load_student
from tests.student.exports import Export, Students

pytestmark = pytest.mark.usefixtures("eager")


@pytest.mark.parametrize("rows", [1, 4, 7, 64])
def test_packing_keeps_every_value(rows: int) -> None:
    ternary = torch.randint(
        -1, 2, (rows, 13), dtype=torch.int8, generator=torch.Generator().manual_seed(rows)
    )
    packed = pack(ternary)
    assert packed.shape == (-(-rows // 4), 13)
    assert torch.equal(unpack(packed, rows), ternary)
    if rows % 4 == 0:
        assert torch.equal(theirs.unpack_weights(packed, torch.int8), ternary)


@pytest.mark.parametrize(("outputs", "inputs", "bias"), [(7, 13, True), (64, 200, False), (3, 1, True)])
def test_the_reference_against_float64(outputs: int, inputs: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer = bitnet.BitLinear(inputs, outputs, bias=bias)
    holder = nn.ModuleDict({"one": layer})
    x = torch.randn(2, 5, inputs) * 3
    x[0, 0] = 0.0
    trained = layer(x)
    to_integers(holder)
    integers = holder["one"]
    assert isinstance(integers, IntegerLinear)
    weight = layer.weight.double()
    scale = weight.abs().mean()
    step = (x.double().abs().amax(-1, keepdim=True) / 127).clamp(min=1e-5 / 127)
    wanted = (x.double() / step).round() * step @ ((weight / scale).round().clamp(-1, 1) * scale).t()
    wanted = wanted + (layer.bias.double() if bias else 0)
    # Exact integers; then two roundings of scales, a product, a quotient and the bias: 6 of float32's 2^-24.
    bound = 6 * 2**-24 * (wanted.abs() + (layer.bias.abs() if bias else 0)) + 1e-12
    for own in (integers(x), trained):
        assert ((own.double() - wanted).abs() <= bound).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_computes_the_reference(students: Students, export: Export, dtype: str) -> None:
    source = students("llama")
    report = export(source, "hf-bitnet", "--dtype", dtype)
    assert report["verification"]["relative_error"] == 0.0
    assert report["rounding"]["relative_error"] == (0.0 if dtype == "float32" else pytest.approx(0, abs=0.1))
    out = Path(report["out"])
    assert json.loads((out / "export_report.json").read_text()) == report
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    stored = load_file(out / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    ternary, scale = bitnet.quantize_weight(load_file(source / "model.safetensors")[f"{name}.weight"])
    assert torch.equal(theirs.unpack_weights(stored[f"{name}.weight"], torch.int8), ternary)
    torch.testing.assert_close(stored[f"{name}.weight_scale"], (1 / scale).reshape(1))
    assert report["bits_per_ternary_weight"] < 2.01


@pytest.mark.parametrize(("conversion", "norms"), [("none", 0), ("subln", 6), ("per-projection", 21)])
def test_what_training_computes_is_what_is_exported(
    train: Callable[..., dict[str, Any]], export: Export, tmp_path: Path, conversion: str, norms: int
) -> None:
    """The fake-quantised training forward, the integer reference and transformers' packed layers are one
    function, with gradients and without.
    """
    trained = tmp_path / "trained"
    train(trained, "--student-model-as-bitnet", "--bitnet-conversion", conversion, "--max-steps", 3)
    student, reference = load_student(trained).train(), open_source(trained).model
    assert sum(layer.rms_norm is not None for _, layer in integer_linears(reference)) == norms
    ids = verify.probes(student.config)
    wanted = verify.logits_of(reference, ids)
    forward = student(input_ids=ids, use_cache=False).logits
    assert forward.requires_grad
    assert verify.compare(forward.detach(), wanted).relative_error <= 1e-5
    out = export(trained, "hf-bitnet", "--dtype", "float32")["out"]
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert verify.compare(verify.logits_of(loaded, ids), wanted).relative_error == 0.0


def test_transformers_trains_it_on(students: Students, export: Export) -> None:
    """Against transformers' own training layers on the latent weights, end to end, in float32."""
    source = students("llama")
    out = Path(export(source, "hf-bitnet", "--dtype", "float32")["out"])
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    trained = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    ids = verify.probes(trained.config)
    agreement = verify.compare(verify.logits_of(loaded, ids), verify.logits_of(trained, ids))
    # transformers' online layer rounds every product, ours sums integers: an activation near the middle of
    # two integers may fall on the other side, which moves one of 64 to 128 inputs by 1/127 of the largest.
    assert agreement.relative_error < 1e-2
    assert agreement.top1_agreement >= 0.98


@pytest.mark.parametrize("wrong", ["scale", "label"])
def test_a_scale_in_the_wrong_direction_is_caught(
    students: Students,
    distily: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wrong: str,
) -> None:
    original = hf_bitnet.write

    def write(source: object, out: Path, dtype: torch.dtype) -> None:
        original(source, out, dtype)  # type: ignore[arg-type]
        if wrong == "scale":
            state = load_file(out / "model.safetensors")
            state = {name: 1 / one if name.endswith("weight_scale") else one for name, one in state.items()}
            save_file(state, out / "model.safetensors", metadata={"format": "pt"})
        else:
            text = (out / "config.json").read_text()
            (out / "config.json").write_text(text.replace('"bitlinear"', '"autobitlinear"'))

    monkeypatch.setattr(hf_bitnet, "write", write)
    out = tmp_path / "out"
    code, _, err = distily("export", students("llama"), "--format", "hf-bitnet", "--out", out)
    assert code == 1
    assert "is not the student" in err
    assert list(tmp_path.iterdir()) == []


def test_refusals(students: Students, refused: Callable[..., str], teacher: Path, tmp_path: Path) -> None:
    source = students("llama")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    assert "is there already" in refused(
        "export", source, "--format", "hf-bitnet", "--out", tmp_path / "used"
    )
    assert "choose one of hf-bitnet" in refused("export", source, "--format", "onnx")
    assert "--dtype int8: choose one of" in refused(
        "export", source, "--format", "hf-bitnet", "--dtype", "int8"
    )
    assert "full-precision student" in refused("export", teacher, "--format", "hf-bitnet")
    assert "no config.json" in refused("export", tmp_path, "--format", "hf-bitnet")
    odd = refused("export", students("llama", intermediate_size=126), "--format", "hf-bitnet")
    assert "mlp.gate_proj has 126 rows, not a multiple of 4" in odd
    assert "--student-model-config" in odd
