"""Teachers in 8 and 4 bit: the numbers are those of rounded weights, and a store knows which it holds."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from featurestore.format.directory import read_spec
from featurestore.format.schema import HiddenSpec
from featurestore.reader import CacheReader
from featurestore.storage.root import root_of
from pipeline.engines.base import EngineConfig
from pipeline.engines.transformers_engine import TransformersEngine
from pipeline.errors import RequestError
from pipeline.teacher.checkpoint import load_teacher
from pipeline.teacher.quantization import BITSANDBYTES_4BIT, BITSANDBYTES_8BIT, loading_quantization
from tests.command import call, generate
from tests.teachers import text_of

LAYERS = (1, 2, 3)
BLOCK = 64


def hidden_states(path: Path, quantize_to: str | None, tokens: np.ndarray) -> np.ndarray:
    """float64 [layers, T, D] as the transformers engine captures them in float32."""
    teacher = load_teacher(str(path))
    groups = tuple(HiddenSpec(layer, "f32") for layer in LAYERS)
    engine = TransformersEngine(
        EngineConfig(
            model=teacher.path,
            architecture=teacher.architecture,
            groups=groups,
            dtype="float32",
            max_seq_len=len(tokens),
            vocab_size=teacher.vocab_size,
            hidden_size=teacher.hidden_size,
            num_layers=teacher.num_layers,
            quantize_to=quantize_to,
        )
    )
    captured = next(engine.capture([tokens]))
    engine.close()
    return np.stack([captured[group].to_float32() for group in groups]).astype(np.float64)


def reference(path: Path, tokens: np.ndarray, weight_of: Any, round_inputs: Any = None) -> np.ndarray:
    """The same in float64, from a teacher whose linear layers have other weights and rounded inputs."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            layer.weight.data = weight_of(layer.weight.data)
            if round_inputs is not None:
                layer.register_forward_pre_hook(lambda _layer, given: (round_inputs(given[0]),))
    with torch.inference_mode():
        out = model(torch.from_numpy(tokens.astype(np.int64))[None], output_hidden_states=True)
    return np.stack([out.hidden_states[layer][0].numpy() for layer in LAYERS])


def int8_rows(given: torch.Tensor) -> torch.Tensor:
    """Each row in 255 steps of its largest magnitude."""
    scale = given.abs().amax(-1, keepdim=True) / 127
    return (given / scale).round() * scale


def nf4_levels() -> torch.Tensor:
    """The 16 levels of NormalFloat4: quantiles of a normal distribution, scaled to [-1, 1] (QLoRA)."""
    inverse, offset = NormalDist().inv_cdf, 0.9677083
    positive = [inverse(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    negative = [-inverse(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    levels = torch.tensor(sorted([*negative, 0.0, *positive]), dtype=torch.float64)
    return levels / levels.max()


def nf4_blocks(weight: torch.Tensor) -> torch.Tensor:
    """Blocks of 64 numbers, each the nearest level times the block's largest magnitude."""
    blocks = weight.reshape(-1, BLOCK)
    scale = blocks.abs().amax(-1, keepdim=True)
    levels = nf4_levels()
    nearest = ((blocks / scale)[..., None] - levels).abs().argmin(-1)
    return (levels[nearest] * scale).reshape(weight.shape)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    file = tmp_path / "corpus.jsonl"
    file.write_text("\n".join(json.dumps({"text": text_of(40, seed)}) for seed in range(4)))
    return file


@pytest.fixture
def tokens() -> np.ndarray:
    return np.random.default_rng(5).integers(3, 17, size=61).astype(np.int32)


def relative(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """[layers]: the norm of the difference over the norm."""
    return np.asarray(np.linalg.norm(found - wanted, axis=(1, 2)) / np.linalg.norm(wanted, axis=(1, 2)))


def test_8_bit_rounds_as_much_as_int8_rows_do(tiny_teacher: Path, tokens: np.ndarray) -> None:
    exact = reference(tiny_teacher, tokens, lambda weight: weight)
    plain = relative(reference(tiny_teacher, tokens, int8_rows, int8_rows), exact)
    found = relative(hidden_states(tiny_teacher, BITSANDBYTES_8BIT, tokens), exact)
    # The same kind of rounding, with inputs that went through float16 and outliers that were spared.
    assert (found <= 1.5 * plain).all() and (found >= plain / 2).all(), (found, plain)


def test_4_bit_is_the_teacher_of_nf4_weights(tiny_teacher: Path, tokens: np.ndarray) -> None:
    exact = reference(tiny_teacher, tokens, lambda weight: weight)
    rounded = reference(tiny_teacher, tokens, nf4_blocks)
    found = hidden_states(tiny_teacher, BITSANDBYTES_4BIT, tokens)
    # Few numbers lie so near the middle of two levels that float32 decides otherwise.
    assert (relative(found, rounded) <= 0.05 * relative(rounded, exact)).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_a_store_knows_its_teachers_bits(
    tiny_teacher: Path,
    corpus: Path,
    tmp_path: Path,
    bits: int,
) -> None:
    store = tmp_path / "store"
    made = generate(tiny_teacher, corpus, store, f"--teacher_load_in_{bits}bit", "True")
    assert made["tokens"]
    assert read_spec(root_of(store))[0].quantization == f"bitsandbytes-{bits}bit"
    assert f"bitsandbytes-{bits}bit" in call("distily-cache", "info", store).stdout
    base = ("distily-cache", "generate", tiny_teacher, corpus, "--out", store)
    base += ("--engine", "transformers", "--max-seq-len", 64)
    for flags in ((), (f"--teacher-load-in-{12 - bits}bit",), (f"--teacher_load_in_{bits}bit", "False")):
        assert "quantization" in call(*base, *flags, code=2).stderr
    same = call(*base, f"--teacher-load-in-{bits}bit", "--json")
    assert json.loads(same.stdout)["tokens"] == 0


def test_a_teacher_writes_unquantised_and_the_command_says_so(
    tiny_teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    base = ("distily-cache", "generate", tiny_teacher, corpus, "--engine", "transformers", "--num-samples", 2)
    base += ("--continuations", 1, "--prompt-tokens", 8, "--continuation-max-tokens", 4)
    texts = []
    for name, flags in (("full", ()), ("quantised", ("--teacher-load-in-8bit",))):
        done = call(*base, "--out", tmp_path / name, *flags)
        assert ("to write; --teacher-load-in-8bit" in done.stderr) == bool(flags)
        reader = CacheReader.open(tmp_path / name)
        texts.append({reader.read(index).tokens.tobytes() for index in range(len(reader))})
    assert texts[0] == texts[1]


def test_what_cannot_be_loaded_so_is_refused() -> None:
    with pytest.raises(RequestError, match=r"--teacher-load-in-8bit: the teacher is saved as gptq"):
        loading_quantization("transformers", 8, "gptq", "bfloat16")
    with pytest.raises(RequestError, match=r"--engine transformers"):
        loading_quantization("vllm", 4, "none", "bfloat16")
    with pytest.raises(RequestError, match=r"--dtype bfloat16"):
        loading_quantization("vllm", 8, "none", "float32")
    assert loading_quantization("vllm", 8, "none", "bfloat16") == "fp8_per_channel"
