"""What a data set of any size costs `distily-cache generate`: memory over time, the first shard, tokenising.

    python -m benchmarks.streaming --gigabytes 20 --seconds 480

A JSON-lines file of that size is written first, made of the Python language reference by repetition with
variation: each document has a line of its own in front, so that no sample repeats. Then `generate` runs with
a tiny Llama, of which a hidden state is kept, is looked at every few seconds, and stopped after --seconds:
the file is not read to its end. Last, the tokenizer alone is measured, on one core and on two, and with all
that we do around it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common import table, write_result
from pipeline.demo import materialise_teacher

SECONDS_BETWEEN = 5.0


def write_corpus(file: Path, gigabytes: float) -> None:
    """JSON lines with a `text` column."""
    from pydoc_data.topics import topics

    bodies = [json.dumps(topics[name])[1:] for name in sorted(topics) if len(topics[name]) < 20_000]
    size = round(gigabytes * 1e9)
    if file.is_file() and file.stat().st_size >= size:
        return
    rng, written, number = random.Random(0), 0, 0
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", buffering=2**24) as target:
        while written < size:
            head = f"Copy {number} ({rng.random()})"
            written += target.write(f'{{"text": "{head}\\n{rng.choice(bodies)}}}\n')
            number += 1


def tiny_teacher(folder: Path, tokenizer_of: Path) -> Path:
    """A Llama of one layer, D=32, with a real tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tokenise(teacher: Path, corpus: Path, bytes_each: int, start: int, way: str) -> tuple[int, float]:
    """Tokens and seconds of one process, which reads `bytes_each` from `start` on."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from pipeline.data.cutting import Cutter, Cutting
    from pipeline.teacher.checkpoint import load_teacher
    from pipeline.teacher.tokenizer import load_tokenizer

    model = load_teacher(str(teacher))
    tokenizer = load_tokenizer(model)
    with corpus.open("rb") as file:
        file.seek(start)
        file.readline()
        texts = [json.loads(line)["text"] for line in file.readlines(bytes_each)]
    cutting = Cutting(
        teacher=model,
        trust_remote_code=False,
        chats=False,
        column="text",
        template=None,
        template_flag="",
        learn_all=True,
        end=None,
        open_end=False,
        prompts=False,
        joiner=None,
        min_seq_len=2,
        max_seq_len=2048,
        drop_long=False,
    )
    cutter, tokens = Cutter(cutting, tokenizer), 0
    began = time.perf_counter()
    for first in range(0, len(texts), 64):
        batch = texts[first : first + 64]
        if way == "tokenizer":
            tokens += sum(len(one) for one in tokenizer.backend_tokenizer.encode_batch_fast(batch))
        else:
            tokens += sum(length for _, length in cutter.cut([("", text) for text in batch]).wanted)
    return tokens, time.perf_counter() - began


def rates(teacher: Path, corpus: Path, bytes_each: int = 20_000_000) -> dict[str, float]:
    """Tokens per second, by what is done and on how many processes."""
    found: dict[str, float] = {}
    for way in ("tokenizer", "samples"):
        for processes in (1, 2):
            with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
                given = [(teacher, corpus, bytes_each, place * bytes_each, way) for place in range(processes)]
                done = [one.result() for one in [pool.submit(tokenise, *each) for each in given]]
            # Both are at work at the same time for as long as the longer.
            found[f"{way}, {processes}"] = sum(tokens for tokens, _ in done) / max(s for _, s in done)
    return found


def watch(words: list[str], store: Path, seconds: float) -> dict[str, Any]:
    """Run a command, look at it every few seconds, and stop it; what was seen."""
    began, rows, first = time.monotonic(), [], None
    log = store.with_suffix(".log")
    with log.open("w") as err:
        process = subprocess.Popen(words, stderr=err)
    while process.poll() is None and time.monotonic() - began < seconds:
        time.sleep(0.5 if first is None else SECONDS_BETWEEN)
        after = time.monotonic() - began
        if first is None and list(store.glob("commit/samples/*.json")):
            first = after
        if not rows or after - rows[-1]["seconds"] >= SECONDS_BETWEEN:
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            rows.append(
                {
                    "seconds": round(after, 1),
                    "rss_mb": [round(one.memory_info().rss / 1e6) for one in family],
                    "shards": len(list(store.glob("commit/samples/*.json"))),
                }
            )
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    lines = log.read_text().splitlines()
    return {"first_shard_seconds": first, "rows": rows, "last_lines": lines[-3:], "code": process.returncode}


def page(found: dict[str, Any]) -> str:
    """The result in Markdown."""
    rows, rates_of = found["generate"]["rows"], found["tokens_per_second"]
    step = max(len(rows) // 16, 1)
    seen = [
        [f"{row['seconds']:.0f}", str(row["shards"]), " + ".join(map(str, row["rss_mb"]))]
        for row in [*rows[:-1:step], rows[-1]]
    ]
    first = found["generate"]["first_shard_seconds"]
    speeds = [[way, f"{rate:,.0f}"] for way, rate in rates_of.items()]
    return (
        f"A file of {found['gigabytes']:.1f} GB, of which the command had read what it captured and two "
        f"portions when it was stopped after {rows[-1]['seconds']:.0f} s; load average of the machine, the "
        f"command included: {found['load']:.0f} on {os.cpu_count()} cores. First shard committed after "
        f"{'-' if first is None else f'{first:.0f}'} s.\n\n"
        + table(["seconds", "shards committed", "resident MB of each process"], seen)
        + "\n\nTokens per second; both processes together where there are two:\n\n"
        + table(["what, on how many processes", "tokens/s"], speeds)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=20.0)
    parser.add_argument("--seconds", type=float, default=480.0)
    parser.add_argument("--engine", default="transformers")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "distily-streaming")
    given = parser.parse_args()
    corpus, store = given.work / "corpus.jsonl", given.work / "store"
    demo = materialise_teacher(given.work / "demo")
    teacher = tiny_teacher(given.work / "teacher", demo)
    write_corpus(corpus, given.gigabytes)
    flags = ["--engine", given.engine, "--max-seq-len", "512", "--top-k", "0", "--hidden-layers", "1"]
    words = ["distily-cache", "generate", str(teacher), str(corpus), "--out", str(store), *flags]
    found = {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "gigabytes": corpus.stat().st_size / 1e9,
        "generate": watch(words, store, given.seconds),
        "load": os.getloadavg()[2],
        "tokens_per_second": rates(teacher, corpus),
    }
    write_result("streaming", "A data set larger than memory", page(found), found["command"])


if __name__ == "__main__":
    main()
