"""compressed-tensors, BitBLAS and `distily-train generate`."""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from student.export import bitblas, verify
from student.export.generation import load, weight_bytes
from student.export.reference import integer_linears
from student.export.source import open_source
from tests.student.exports import Export, Students

pytestmark = pytest.mark.usefixtures("eager")
Run = Callable[..., tuple[int, str, str]]


def test_compressed_tensors_holds_two_bits_a_weight(students: Students, export: Export) -> None:
    source = students("qwen2")
    report = export(source, "compressed-tensors", "--dtype", "float32")
    assert report["verification"]["relative_error"] == 0.0
    out = Path(report["out"])
    entry = json.loads((out / "config.json").read_text())["quantization_config"]
    group = entry["config_groups"]["group_0"]
    assert (group["weights"]["num_bits"], group["input_activations"]["num_bits"]) == (2, 8)
    state = load_file(out / "model.safetensors")
    layers = dict(integer_linears(open_source(source).model))
    name = "model.layers.1.mlp.down_proj"
    packed, shape = state[f"{name}.weight_packed"], torch.Size(state[f"{name}.weight_shape"].tolist())
    assert torch.equal(unpack_from_int32(packed, 2, shape), layers[name].ternary())
    # As it is loaded and run there, activations have other steps (127.5 instead of 127): near, not equal.
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ids = verify.probes(loaded.config)
    reference = verify.logits_of(load(source), ids)
    assert verify.compare(verify.logits_of(loaded, ids), reference).relative_error < 0.1


def test_bitblas_names_what_is_missing(
    students: Students, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The import fails in two ways: no package, or a package whose CUDA libraries are not found."""
    student = students("llama")

    others = importlib.import_module

    def missing(name: str, package: str | None = None) -> ModuleType:
        if name != "bitblas":
            return others(name, package)
        raise OSError("libcuda.so.1: cannot open shared object file")

    if not torch.cuda.is_available():
        assert "bitblas" in refused("export", student, "--format", "bitblas").lower()
        assert "BitBLAS" in refused("generate", student, "--prompt", "the", "--kernel", "bitblas")
    monkeypatch.setattr(bitblas.importlib, "import_module", missing)
    line = refused("export", student, "--format", "bitblas")
    for word in ("libcuda.so.1", "pip install bitblas", "CUDA 12", "libnvrtc.so.12", "nvcc", "hf-bitnet"):
        assert word in line


class StandIn:
    """BitBLAS's `Matmul` as far as it is used, computed by torch on a CPU: BitBLAS itself was not run."""

    made: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, config: dict[str, Any], enable_tuning: bool = True) -> None:
        self.made.append(config | {"enable_tuning": enable_tuning})

    def transform_weight(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.flip(0)

    def __call__(self, ints: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return (ints.double() @ weight.flip(0).double().t()).int()


def test_bitblas_has_an_operator_for_each_shape(
    students: Students, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in, on a CPU: layers of one shape share an untuned operator, and give the reference."""
    package = ModuleType("bitblas")
    vars(package).update(MatmulConfig=dict, Matmul=StandIn)
    others, student = importlib.import_module, students("llama")
    monkeypatch.setattr(
        bitblas.importlib, "import_module", lambda name: package if name == "bitblas" else others(name)
    )
    model = load(student)
    verify_ids = verify.probes(model.config)
    reference = verify.logits_of(model, verify_ids)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.nn.Module, "cuda", lambda self: self)
    monkeypatch.setattr(bitblas.shutil, "which", lambda _: None)
    assert "no nvcc" in refused("generate", student, "--prompt", "the", "--kernel", "bitblas")
    monkeypatch.setattr(bitblas.shutil, "which", lambda name: f"/usr/bin/{name}")
    layers = [layer for _, layer in integer_linears(model)]
    shapes = {(layer.out_features, layer.in_features) for layer in layers}
    bitblas.use_bitblas(model)
    assert torch.equal(verify.logits_of(model, verify_ids), reference)
    made = [(config["N"], config["K"]) for config in StandIn.made]
    assert len(made) == len(shapes) < len(layers)
    assert set(made) == shapes
    assert not any(config["enable_tuning"] for config in StandIn.made)


def test_packed_or_not_a_student_says_the_same(students: Students, export: Export, distily: Run) -> None:
    source = students("llama")
    packed = Path(export(source, "hf-bitnet", "--dtype", "float32")["out"])
    results = []
    for directory in (source, packed):
        flags = ["--prompt", "the teacher is", "--max-new-tokens", 12]
        code, out, err = distily("generate", directory, *flags, "--json")
        assert code == 0, err
        results.append(json.loads(out))
    one, other = results
    assert one["text"] == other["text"] != ""
    assert one["new_tokens"] == 12
    assert one["prompt_tokens"] == 3
    assert one["weight_bytes"] == other["weight_bytes"]
    assert min(one["tokens_per_second"], one["peak_memory_bytes"]) > 0
    code, out, err = distily("generate", packed, "--prompt", "a token", "--temperature", 1, "--seed", 3)
    assert code == 0, err
    assert "tokens/s" in err


def test_packed_weights_stay_packed(students: Students, export: Export) -> None:
    packed = load(Path(export(students("llama"), "hf-bitnet")["out"]))
    latent = AutoModelForCausalLM.from_pretrained(students("llama"), dtype=torch.float32)
    matrices = sum(layer.in_features * layer.out_features for _, layer in integer_linears(packed))
    # Four bytes of a latent weight against a quarter of a byte.
    assert weight_bytes(latent) - weight_bytes(packed) == pytest.approx(3.75 * matrices, rel=0.02)


def test_a_student_of_a_type_of_ours_comes_without_a_warning(
    students: Students, distily: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    source = students("gemma2", conversion="subln")
    code, _, err = distily("generate", source, "--prompt", "the", "--max-new-tokens", 1)
    assert code == 0, err
    assert "model of type" not in caplog.text


def test_the_chat_template_is_used_unless_told(students: Students, distily: Run) -> None:
    source = students("llama", max_position_embeddings=96)
    template = "{% for m in messages %}the teacher is {{ m['content'] }}{% endfor %}"
    (source / "chat_template.jinja").write_text(template)
    counts = []
    for flag in ("--chat", "--no-chat"):
        code, out, err = distily("generate", source, "--prompt", "a", "--max-new-tokens", 1, "--json", flag)
        assert code == 0, err
        counts.append(json.loads(out)["prompt_tokens"])
    assert counts == [4, 1]


def test_generate_refuses(students: Students, export: Export, refused: Callable[..., str]) -> None:
    source = students("llama")
    assert "--kernel cuda: choose one of" in refused("generate", source, "--prompt", "a", "--kernel", "cuda")
    assert "--temperature" in refused("generate", source, "--prompt", "a", "--temperature", -1)
    assert "--max-new-tokens" in refused("generate", source, "--prompt", "a", "--max-new-tokens", 0)
    assert "no tokens" in refused("generate", source, "--prompt", "")
    assert "no config.json" in refused("generate", source / "tokenizer", "--prompt", "a")
    other = export(source, "compressed-tensors")["out"]
    assert "generate reads" in refused("generate", other, "--prompt", "a")
