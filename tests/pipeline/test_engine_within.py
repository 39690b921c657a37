"""Commands with vLLM within their own process, which VLLM_ENABLE_V1_MULTIPROCESSING=0 asks for: quantised
teachers, and a line from inside the engine that is the command's last.

All in one program, whose start takes longer than most of them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from featurestore.format.directory import read_spec
from featurestore.format.schema import HiddenSpec
from featurestore.reader import CacheReader
from featurestore.storage.root import root_of
from tests import architectures
from tests.command import run_module
from tests.pipeline.test_quantized import LAYERS, int8_rows, reference, relative
from tests.teachers import text_of

ROUNDED = ("--top-k", 0, "--hidden-layers", "1,2,3", "--hidden-dtype", "f32", "--dtype", "bfloat16")


def fp8_rows(given: torch.Tensor) -> torch.Tensor:
    """Each row as float8_e4m3, scaled so that its largest magnitude is the largest float8."""
    scale = given.abs().amax(-1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    return (given / scale).to(torch.float8_e4m3fn).to(given.dtype) * scale


def int8_checkpoint(source: Path, directory: Path) -> Path:
    """`source` as compressed-tensors would save it in W8A8: int8 rows, inputs rounded per token."""
    shutil.copytree(source, directory)
    weights = load_file(directory / "model.safetensors")
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        scale = weights[name].abs().amax(-1, keepdim=True) / 127
        weights[name] = (weights[name] / scale).round().to(torch.int8)
        weights[f"{name}_scale"] = scale
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    eight_bit = {"num_bits": 8, "type": "int", "symmetric": True}
    scheme = {
        "targets": ["Linear"],
        "weights": eight_bit | {"strategy": "channel", "dynamic": False},
        "input_activations": eight_bit | {"strategy": "token", "dynamic": True},
    }
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": scheme},
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def folder(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teachers and text; stores/ has that of each command, under its name."""
    folder = tmp_path_factory.mktemp("within")
    corpus = folder / "corpus.jsonl"
    corpus.write_text("\n".join(json.dumps({"text": text_of(40, seed)}) for seed in range(4)))
    int8_checkpoint(tiny_teacher, folder / "w8a8")
    architectures.make("gemma3n_text", folder / "streams")
    return folder


@pytest.fixture(scope="module")
def done(tiny_teacher: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """Exit code and standard error of each command, by its store's name."""
    commands: dict[str, tuple[object, ...]] = {
        "fp8_per_channel": (tiny_teacher, "--teacher-load-in-8bit", *ROUNDED),
        "compressed-tensors": (folder / "w8a8", *ROUNDED),
        "streams": (folder / "streams", "--hidden-layers", 1),
    }
    corpus, lines = folder / "corpus.jsonl", {}
    for name, (teacher, *flags) in commands.items():
        words = ("generate", teacher, corpus, "--out", folder / "stores" / name, "--max-seq-len", 64, *flags)
        lines[name] = list(map(str, words))
    (folder / "lines.json").write_text(json.dumps(lines))
    printed = run_module("tests.pipeline.commands", folder / "lines.json")
    found: dict[str, dict[str, Any]] = json.loads(printed.splitlines()[-1])
    return found


@pytest.mark.vllm
@pytest.mark.parametrize("kind", ["fp8_per_channel", "compressed-tensors"])
def test_vllm_rounds_as_much_as_the_format_does(
    tiny_teacher: Path, folder: Path, done: dict[str, dict[str, Any]], kind: str
) -> None:
    assert done[kind]["code"] == 0, done[kind]
    store, in_8_bit = folder / "stores" / kind, kind == "fp8_per_channel"
    assert read_spec(root_of(store))[0].quantization == kind
    rounding = fp8_rows if in_8_bit else int8_rows
    sample = CacheReader.open(store).read(0)
    exact = reference(tiny_teacher, sample.tokens, lambda weight: weight)
    plain = relative(reference(tiny_teacher, sample.tokens, rounding, rounding), exact)
    states = [sample.features[HiddenSpec(layer, "f32")].to_float32() for layer in LAYERS]
    found = relative(np.stack(states).astype(np.float64), exact)
    # bfloat16 rounds the residual stream itself, to 2**-9 of its size after each of seven additions.
    assert (found <= 1.5 * plain + 7 * 2**-9).all() and (found >= plain / 2).all(), (found, plain)


@pytest.mark.vllm
def test_a_line_from_the_worker_is_the_commands_last(folder: Path, done: dict[str, dict[str, Any]]) -> None:
    """Gemma 3n passes four streams at a time from layer to layer."""
    code, errors = done["streams"]["code"], done["streams"]["stderr"]
    assert code == 2 and "Traceback" not in errors and "Triton" not in errors
    last = errors.splitlines()[-1]
    assert "--hidden-layers" in last and "--engine transformers" in last and "[4, 160, 64]" in last
    assert not list((folder / "stores" / "streams").glob("commit/*/*.json"))
