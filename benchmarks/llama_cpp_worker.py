"""Runs in a Python that has llama-cpp-python: logits of given tokens, float16 files, and speeds.

`python -P llama_cpp_worker.py logits|half|speed TOKENS.json MODEL.gguf…` prints a JSON object; `logits`
writes TOKENS.npy, `half` the model with float16 matrices beside it. `-P` keeps this directory, with its
llama_cpp.py, off the import path.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import llama_cpp
import numpy as np

F32, F16_FILE = 0, 1
ROUNDS, PROMPT, NEW = 3, 256, 48


def to_half(path: Path) -> None:
    """The same model with float16 matrices, as MODEL.f16.gguf."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize, params.nthread = F16_FILE, True, 1
    out = path.with_suffix(".f16.gguf")
    assert llama_cpp.llama_model_quantize(str(path).encode(), str(out).encode(), params) == 0


def open_model(path: Path, threads: int, logits_all: bool) -> llama_cpp.Llama:
    """Keys and values in float32, attention without its fused kernel."""
    return llama_cpp.Llama(
        str(path),
        n_ctx=512,
        n_batch=512,
        n_threads=threads,
        n_threads_batch=threads,
        logits_all=logits_all,
        type_k=F32,
        type_v=F32,
        flash_attn=False,
        verbose=False,
    )


def logits(path: Path, samples: list[list[int]]) -> np.ndarray:
    """Float32 [positions of all samples, vocabulary]."""
    model, rows = open_model(path, 1, logits_all=True), []
    for ids in samples:
        model.reset()
        model.eval(ids)
        rows.append(np.array(model.scores[: len(ids)], np.float32))
    return np.concatenate(rows)


def rates(model: llama_cpp.Llama, ids: list[int]) -> dict[str, float]:
    """Tokens per second of the prompt, and of what follows token by token; the same per second of the
    processor, of all threads together, which other work on the machine disturbs less.
    """
    model.reset()
    marks = [(time.perf_counter(), time.process_time())]
    model.eval(ids[:PROMPT])
    marks.append((time.perf_counter(), time.process_time()))
    for token in ids[PROMPT : PROMPT + NEW]:
        model.eval([token])
    marks.append((time.perf_counter(), time.process_time()))
    start, middle, end = marks
    return {
        "prompt": PROMPT / (middle[0] - start[0]),
        "new": NEW / (end[0] - middle[0]),
        "prompt_processor": PROMPT / (middle[1] - start[1]),
        "new_processor": NEW / (end[1] - middle[1]),
    }


def speed(paths: list[Path], ids: list[int]) -> list[dict[str, float]]:
    """Medians of interleaved rounds, for one and two threads; a round before them is not counted."""
    results = []
    for threads in (1, 2):
        models = {path: open_model(path, threads, logits_all=False) for path in paths}
        measured = [{path: rates(model, ids) for path, model in models.items()} for _ in range(ROUNDS + 1)]
        for path in paths:
            rounds = [one[path] for one in measured[1:]]
            medians = {what: statistics.median(one[what] for one in rounds) for what in rounds[0]}
            new = [one["new"] for one in rounds]
            spread = (max(new) - min(new)) / medians["new"]
            results.append({"file": path.name, "threads": threads, "spread": spread, **medians})
    return results


def main() -> None:
    mode, tokens, *names = sys.argv[1:]
    paths = [Path(name) for name in names]
    samples = json.loads(Path(tokens).read_text())
    result = {
        "version": llama_cpp.__version__,
        "system": llama_cpp.llama_print_system_info().decode().strip(),
    }
    if mode == "logits":
        np.save(Path(tokens).with_suffix(".npy"), logits(paths[0], samples))
        model = llama_cpp.Llama(str(paths[0]), vocab_only=True, verbose=False)
        result["tokenized"] = model.tokenize(b"The capital of France is Paris in 1789.", add_bos=False)
    elif mode == "half":
        to_half(paths[0])
    else:
        result["rates"] = speed(paths, [token for one in samples for token in one])
    print(json.dumps(result))


if __name__ == "__main__":
    main()
