"""Runs in a Python that has llama-cpp-python: logits of given tokens, and the speed of generating.

`python -P llama_cpp_worker.py MODEL.gguf TOKENS.json LOGITS.npy` prints a JSON object. `-P` keeps this
directory, with its llama_cpp.py, off the import path.
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


def speed(model: llama_cpp.Llama, prompt: list[int], count: int = 128) -> float:
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


def main() -> None:
    path, tokens, logits = (Path(one) for one in sys.argv[1:])
    samples = json.loads(tokens.read_text())
    model, rows = open_model(path), []
    for ids in samples:
        model.reset()
        model.eval(ids)
        rows.append(np.array(model.scores[: len(ids)], np.float32))
    np.save(logits, np.concatenate(rows))
    half = to_f16(path)
    result = {
        "system": llama_cpp.llama_print_system_info().decode(),
        "version": llama_cpp.__version__,
        "rate": speed(model, samples[0]),
        "f16_rate": speed(open_model(half), samples[0]),
        "bytes": path.stat().st_size,
        "f16_bytes": half.stat().st_size,
        "tokenized": model.tokenize(b"The capital of France is Paris in 1789.", add_bos=False),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
