"""GGUF: transformers reads back what the student computes, blocks hold the matrices exactly, tokenizer and
settings are llama.cpp's, and what it would not compute is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from student.export import verify
from student.export.gguf import reading as gguf_reading
from student.export.gguf import writing as exporter
from student.export.gguf.scales import fit_scales, float16_pair
from student.export.gguf.types import TYPES, from_blocks, to_blocks
from student.export.reference import integer_linears
from student.export.source import open_source
from tests.student.exports import Export, Students

SHAPE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "head_dim": 64}


@pytest.mark.parametrize("name", TYPES)
def test_blocks_hold_ternary_matrices_exactly(name: str) -> None:
    kind = TYPES[name]
    rng = np.random.default_rng(0)
    ternary = rng.integers(-1, 2, (17, 512)).astype(np.int8)
    ternary[3] = 0
    ternary[5, :256] = 0
    scale = float(np.float16(0.0123))
    blocks = to_blocks(ternary, scale, kind)
    assert blocks.shape == (17, 512 // kind.columns * kind.block_bytes)
    values, scales = from_blocks(blocks, kind)
    assert np.array_equal(values, ternary)
    assert (scales == np.float32(scale)).all()
    if name != "Q2_0":
        wanted = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(kind.number))
        assert np.array_equal(wanted, ternary * np.float32(scale))


def test_q2_0_is_laid_out_as_ggml_has_it() -> None:
    """ggml's block_q2_0: half d, then 16 bytes of four neighbours each, lowest bits first, value + 1."""
    ternary = np.zeros((1, 64), np.int8)
    ternary[0, :6] = [-1, 0, 1, 1, 1, -1]
    block = to_blocks(ternary, 1.0, TYPES["Q2_0"])[0]
    assert block.tobytes() == b"\x00\x3c" + bytes([0b10100100, 0b01010010]) + b"\x55" * 14


def floats(model: nn.Module) -> nn.Module:
    """A copy with its ternary matrices multiplied out and activations of full precision."""
    copied = copy.deepcopy(model)
    for name, layer in integer_linears(model):
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        linear.weight.data = layer.ternary() / layer.weight_scale
        if layer.bias is not None:
            linear.bias.data = layer.bias
        norm = [] if layer.rms_norm is None else [copy.deepcopy(layer.rms_norm)]
        copied.set_submodule(name, nn.Sequential(*norm, linear))
    return copied


def test_q4_0_is_laid_out_as_ggml_has_it() -> None:
    """ggml's block_q4_0: half d, then 16 bytes of column j and column 16 + j, low bits first, value + 8."""
    ternary = np.zeros((1, 32), np.int8)
    ternary[0, [0, 1, 16, 18]] = [-1, 1, 1, -1]
    block = to_blocks(ternary, 1.0, TYPES["Q4_0"])[0]
    assert block.tobytes() == b"\x00\x3c" + bytes([0x97, 0x89, 0x78]) + b"\x88" * 13


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_transformers_reads_the_student_back(students: Students, export: Export, model_type: str) -> None:
    source = students(model_type, **SHAPE, **({"sliding_window": None} if model_type == "mistral" else {}))
    kind = {"qwen2": "TQ1_0", "qwen3": "Q4_0"}.get(model_type, "TQ2_0")
    report = export(source, "gguf", "--gguf-type", kind, "--dtype", "float32")
    assert report["verification"]["reader"] == "transformers"
    # Its matrices, taken apart into integers again, compute the reference at stored precision exactly.
    assert report["verification"]["relative_error"] == 0.0
    # As transformers runs the file, with activations of full precision, against the student's own scales.
    opened = open_source(source)
    ids = verify.probes(opened.model.config)
    loaded = gguf_reading.load(next(Path(report["out"]).glob("*.gguf")), opened)
    exact = verify.logits_of(floats(opened.model), ids)
    assert verify.compare(verify.logits_of(loaded, ids), exact).relative_error <= 1e-3


@pytest.mark.parametrize(("model_type", "mode"), [("llama", "none"), ("llama", "subln"), ("qwen2", "none")])
def test_scales_that_float16_holds_change_nothing(students: Students, model_type: str, mode: str) -> None:
    """Where each is rounded for itself, the same students move by 2e-4 to 5e-4."""
    model = open_source(students(model_type, conversion=mode, **SHAPE)).model
    ids = verify.probes(model.config)
    before = verify.logits_of(floats(model), ids)
    fit_scales(model)
    scales = torch.cat([1.0 / layer.weight_scale for _, layer in integer_linears(model)])
    torch.testing.assert_close(scales, scales.half().float(), rtol=2**-23, atol=0)
    assert verify.compare(verify.logits_of(floats(model), ids), before).relative_error < 1e-5


def test_pairs_of_float16_scales_keep_the_product() -> None:
    """Rounded one by one they leave up to 2^-10 of it."""
    rng = np.random.default_rng(0)
    for first, second in 2.0 ** rng.uniform(-10, 4, (300, 2)):
        pair = float16_pair(first, second)
        assert all(float(np.float16(one)) == one for one in pair)
        assert abs(pair[0] * pair[1] / (first * second) - 1) < 2**-16
        assert 0.5 < pair[0] / first < 2
    assert all(np.isfinite(float16_pair(65504.0, 2.0**-14)))


@pytest.mark.parametrize(("name", "mode"), [("Q2_0", "none"), ("TQ2_0", "subln")])
def test_what_transformers_does_not_read(students: Students, tmp_path: Path, name: str, mode: str) -> None:
    source, kind = open_source(students("llama", conversion=mode, **SHAPE)), TYPES[name]
    ids = verify.probes(source.model.config)
    before = verify.logits_of(floats(source.model), ids)
    exporter.check(source, kind)
    exporter.fit(source, torch.float32)
    exporter.write(source, tmp_path, torch.float32, kind)
    assert not gguf_reading.by_transformers(source, kind)
    path = exporter.file_in(tmp_path, kind)
    loaded = gguf_reading.read(path, source, kind)
    assert torch.equal(verify.logits_of(loaded, ids), verify.logits_of(source.model, ids))
    assert verify.compare(verify.logits_of(floats(loaded), ids), before).relative_error <= 1e-3
    if mode == "subln":
        reader = gguf.GGUFReader(path)
        assert reader.fields["general.architecture"].contents() == "bitnet"
        names = {tensor.name for tensor in reader.tensors}
        assert {"blk.0.attn_sub_norm.weight", "blk.1.ffn_sub_norm.weight", "output_norm.weight"} <= names


def test_own_parser_agrees_with_the_package(students: Students, export: Export) -> None:
    path = next(Path(export(students("llama", **SHAPE), "gguf")["out"]).glob("*.gguf"))
    parsed = gguf_reading.parse(path)
    tensors = gguf.GGUFReader(path).tensors
    assert len(tensors) == len(parsed)
    for tensor in tensors:
        own = parsed[tensor.name]
        assert own.shape == tuple(int(size) for size in tensor.shape[::-1])
        assert own.number == tensor.tensor_type
        assert np.array_equal(own.data[: tensor.n_bytes], tensor.data.reshape(-1).view(np.uint8))


def byte_level(vocab: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with two merges, digits apart, as SmolLM has it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet, "th", "the"]
    tokenizer = Tokenizer(
        models.BPE({token: index for index, token in enumerate(tokens)}, [("t", "h"), ("th", "e")])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    assert len(tokens) < vocab
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=tokens[1], eos_token=tokens[2])
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return fast


def test_a_byte_level_tokenizer_travels_along(students: Students, export: Export, tmp_path: Path) -> None:
    source = students("llama", **SHAPE, vocab_size=300)
    own = byte_level(300)
    own.save_pretrained(source)
    path = next(Path(export(source, "gguf")["out"]).glob("*.gguf"))
    reader = gguf.GGUFReader(path)
    assert reader.fields["tokenizer.ggml.pre"].contents() == "smollm"
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    assert (len(tokens), tokens[299]) == (300, "[PAD299]")
    assert reader.fields["tokenizer.chat_template"].contents() == own.chat_template
    read = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    text = "the other thé\n<|im_end|> <x>"
    assert read(text, add_special_tokens=False).input_ids == own(text, add_special_tokens=False).input_ids


def test_refusals(students: Students, refused: Callable[..., str]) -> None:
    small = students("llama")
    line = refused("export", small, "--format", "gguf")
    assert "q_proj has 64 columns, not a multiple of 256" in line
    assert "or --gguf-type Q2_0, whose blocks have 64" in line
    assert "choose one of TQ2_0, TQ1_0, Q2_0, Q4_0" in refused(
        "export", small, "--format", "gguf", "--gguf-type", "Q4"
    )
    assert "leave it out" in refused("export", small, "--format", "hf-bitnet", "--gguf-type", "TQ2_0")
    gemma = students("gemma2", **SHAPE)
    assert "no GGUF export for gemma2 students" in refused("export", gemma, "--format", "gguf")
    window = students("mistral", **SHAPE)
    assert "no sliding window" in refused("export", window, "--format", "gguf")
