"""Does llama.cpp compute an exported student, how large is it, how fast?

`LLAMA_PYTHON=… python benchmarks/llama_cpp.py STUDENT:TYPE…`: a Python that has llama-cpp-python, and BitNet
students with the GGUF type of each. llama.cpp quantises activations in blocks with a scale each (256 columns
beside TQ2_0 and TQ1_0, 32 with float16 scales beside Q2_0), not a token at a time, so it is compared with an
emulation of that, and the emulation with the integer reference.

Shape letters: N tokens, I input features, G blocks, C columns of a block, V vocabulary.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RUN, table, write_result
from torch import Tensor

from student.export.command import export, round_values
from student.export.formats import ExportRequest
from student.export.reference import IntegerLinear, integer_linears
from student.export.source import open_source
from student.export.verify import compare, logits_of

SAMPLES, LENGTH = 8, 64


class BlockedLinear(IntegerLinear):
    """An IntegerLinear with activations in blocks, as llama.cpp's Q8_K or Q8_0."""

    columns = 256

    def forward(self, input: Tensor) -> Tensor:
        x = input if self.rms_norm is None else self.rms_norm(input)
        x_NGC = x.reshape(-1, self.in_features // self.columns, self.columns)
        peak = x_NGC.gather(-1, x_NGC.abs().argmax(-1, keepdim=True))
        if self.columns == 256:
            inverse = -127 / peak
            scale = 1 / inverse
        else:
            inverse = 127 / peak.abs()
            scale = (1 / inverse).half().float()
        ints_NGC = (x_NGC * torch.where(peak == 0, 0, inverse)).round().clamp(max=127)
        rounded_NI = (ints_NGC * torch.where(peak == 0, 0, scale)).reshape(-1, self.in_features)
        y_NO = rounded_NI @ self.ternary().float().t() / self.weight_scale
        if self.bias is not None:
            y_NO += self.bias
        return y_NO.reshape(*input.shape[:-1], self.out_features)


def samples(directory: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    lines = (RUN / "topics.jsonl").read_text(encoding="utf-8").splitlines()[:SAMPLES]
    return [tokenizer(json.loads(line)["text"]).input_ids[:LENGTH] for line in lines]


def run_llama(path: Path, tokens: list[list[int]], mode: str) -> dict[str, Any]:
    """What the worker prints; with mode "logits" they are under that key, [N, V]."""
    worker = Path(__file__).with_name("llama_cpp_worker.py")
    given = path.with_name("tokens.json")
    given.write_text(json.dumps(tokens))
    command = [os.environ["LLAMA_PYTHON"], "-P", str(worker), mode, str(path), str(given)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    if mode == "logits":
        result["logits"] = torch.from_numpy(np.load(given.with_suffix(".npy")))
    return result


def emulated(directory: Path, kind: str, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [N, V] of the integer reference and of the same with blocked activations."""
    source = open_source(directory)
    round_values(source.model, torch.float32, torch.float16)
    reference = logits_of(source.model, ids_BT)
    for _, layer in integer_linears(source.model):
        layer.__class__ = BlockedLinear
        layer.columns = 32 if kind == "Q2_0" else 256
    return tuple(one.flatten(0, 1) for one in (reference, logits_of(source.model, ids_BT)))


def study(directory: Path, kind: str) -> tuple[list[str], list[str], dict[str, Any]]:
    tokens = samples(directory)
    with tempfile.TemporaryDirectory() as name:
        exact, half = Path(name) / "exact", Path(name) / "half"
        report = export(ExportRequest(directory, "gguf", exact, "float32", kind))
        got = run_llama(next(exact.glob("*.gguf")), tokens, "logits")["logits"]
        export(ExportRequest(directory, "gguf", half, "float16", kind))
        run = run_llama(next(half.glob("*.gguf")), tokens, "speed")
    reference, blocked = emulated(directory, kind, torch.tensor(tokens))
    near, far = compare(got, blocked), compare(got, reference)
    blocking = compare(blocked, reference)
    config = json.loads((directory / "config.json").read_text())
    shape = f"{config['num_hidden_layers']} layers of {config['hidden_size']}/{config['intermediate_size']}"
    agreement = [
        kind,
        shape,
        f"{near.positions:,}",
        f"{near.top1_agreement:.2%}",
        f"{near.relative_error:.1e}",
        f"{far.top1_agreement:.2%}",
        f"{far.relative_error:.1e}",
        f"{blocking.relative_error:.1e}",
    ]
    fast = [
        kind,
        f"{report['bits_per_ternary_weight'] / 8:.4f}",
        f"{run['bytes'] / 1e6:.1f}",
        f"{run['f16_bytes'] / 1e6:.1f}",
        f"{run['rate']:.0f}",
        f"{run['f16_rate']:.0f}",
        f"{run['rate'] / run['f16_rate']:.2f}",
    ]
    first = [reference.argmax(-1), blocked.argmax(-1), got.argmax(-1)]
    run["distinct"] = len(set(got.argmax(-1).tolist()))
    run["tokens"] = [one[-12:].tolist() for one in first]
    run["own_tokens"] = own_tokens(directory)
    return agreement, fast, run


def own_tokens(directory: Path) -> list[int]:
    from transformers import AutoTokenizer

    text = "The capital of France is Paris in 1789."
    ids: list[int] = AutoTokenizer.from_pretrained(directory)(text, add_special_tokens=False).input_ids
    return ids


def main() -> None:
    results = [study(Path(path), kind) for path, kind in (one.rsplit(":", 1) for one in sys.argv[1:])]
    exact = table(
        [
            "type",
            "student",
            "positions",
            "best token, llama.cpp = emulation",
            "logits differ by",
            "best token, llama.cpp = integer reference",
            "logits differ by",
            "emulation from reference",
        ],
        [one[0] for one in results],
    )
    fast = table(
        ["type", "bytes per ternary weight", "file, MB", "F16 file, MB", "tokens/s", "F16 tokens/s", "ratio"],
        [one[1] for one in results],
    )
    runs = [one[2] for one in results]
    tokens = "\n".join(
        f"- {one[0][0]}: reference {one[2]['tokens'][0]}, emulation {one[2]['tokens'][1]}, llama.cpp "
        f"{one[2]['tokens'][2]}; {one[2]['distinct']} different tokens in all; "
        f"a sentence is split as by transformers: "
        f"{one[2]['tokenized'] == one[2]['own_tokens']}"
        for one in results
    )
    body = (
        f"llama-cpp-python {runs[0]['version']}, one thread. Logits are compared with embeddings and head in "
        f"float32, sizes and speeds are with float16. The text is the demo's.\n\n{exact}\n\n{fast}\n\n"
        f"The best next tokens at the last "
        f"12 positions:\n\n{tokens}\n\nllama.cpp: {runs[0]['system'].strip()}"
    )
    write_result("llama_cpp", "GGUF exports in llama.cpp", body)


if __name__ == "__main__":
    main()
