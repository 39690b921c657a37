"""Runs in a Python that has llama-cpp-python: logits of given tokens, and the speed of generating.

`python -P llama_cpp_worker.py logits|speed MODEL.gguf TOKENS.json` prints a JSON object; `logits` writes
TOKENS.npy. `-P` keeps this directory, with its llama_cpp.py, off the import path.
"""

import json
import sys
import time
from pathlib import Path

import llama_cpp
import numpy as np

F32, F16_FILE = 0, 1


def to_f16(path: Path) -> Path:
    """The same model with float16 matrices."""
    out = path.with_suffix(".f16.gguf")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize, params.nthread = F16_FILE, True, 1
    assert llama_cpp.llama_model_quantize(str(path).encode(), str(out).encode(), params) == 0
    return out


def open_model(path: Path) -> llama_cpp.Llama:
    return llama_cpp.Llama(
        str(path),
        n_ctx=512,
        n_batch=512,
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        type_k=F32,
        type_v=F32,
        verbose=False,
    )


def speed(model: llama_cpp.Llama, prompt: list[int], count: int = 64) -> float:
    """New tokens per second, best of three."""
    best = 0.0
    for _ in range(3):
        model.reset()
        model.eval(prompt)
        started = time.perf_counter()
        for _ in range(count):
            model.eval([model.sample(temp=0.0)])
        best = max(best, count / (time.perf_counter() - started))
    return best


def logits(path: Path, samples: list[list[int]]) -> np.ndarray:
    """Float32 [positions of all samples, vocabulary]."""
    model, rows = open_model(path), []
    for ids in samples:
        model.reset()
        model.eval(ids)
        rows.append(np.array(model.scores[: len(ids)], np.float32))
    return np.concatenate(rows)


def main() -> None:
    mode, (path, tokens) = sys.argv[1], map(Path, sys.argv[2:])
    samples = json.loads(tokens.read_text())
    result = {
        "system": llama_cpp.llama_print_system_info().decode(),
        "version": llama_cpp.__version__,
    }
    if mode == "logits":
        np.save(tokens.with_suffix(".npy"), logits(path, samples))
    else:
        half = to_f16(path)
        models = [open_model(path), open_model(half)]
        rates = [speed(model, samples[0]) for model in models]
        result |= {"rate": rates[0], "f16_rate": rates[1]}
        result |= {"bytes": path.stat().st_size, "f16_bytes": half.stat().st_size}
        result["tokenized"] = models[0].tokenize(b"The capital of France is Paris in 1789.", add_bos=False)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
