"""Training from an object store without copies: tokens per second, and what is downloaded.

A tiny teacher (3 layers, 199 tokens) fills a store in shards of 2,048 tokens, with the default distribution
and a hidden layer that the training has no use for. A 2-layer student then trains from it, for a tenth of an
epoch and for a whole one: from a directory, from a bucket of which this machine has no copies, and once more
with the copies. Between training and the server (moto's) stands a proxy that answers at once, or as a service
does that is 30 ms away. The student is so small that data are asked for far quicker than by a real one: this
is about the worst case.

Tokens per second are those of the training loop. Bytes are those of replies, of files of shards and of all
else (records, tokenizer). "needed" are the bytes of those files of shards of which the steps read any sample.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from threading import Lock
from typing import Any

from common import BIN, ROOT, table, train, write_result

os.environ["PYTHONPATH"] = str(ROOT)
sys.path.insert(0, str(ROOT))

from http.server import BaseHTTPRequestHandler

from featurestore.order import EpochOrder
from featurestore.reader import CacheReader
from featurestore.store import FeatureStore
from tests import teachers
from tests.proxy import Proxy
from tests.s3 import Bucket, environment, running

DOCUMENTS, WORDS, BATCH, SEED = 512, 255, 8, 0
FLAGS = (
    *("--student-model-config", '{"num_hidden_layers": 2}', "--init", "random", "--logging-steps", "5"),
    *("--per-device-train-batch-size", str(BATCH), "--eval-fraction", "0", "--seed", str(SEED)),
    *("--save-strategy", "no", "--eval-strategy", "no", "--report-to", "none"),
)


class Line(Proxy):
    """Answers `latency` seconds after it was asked, and counts what it sends of which objects."""

    def __init__(self, endpoint: str, latency: float) -> None:
        super().__init__(endpoint)
        self.latency, self.requests, self.sent = latency, 0, dict[str, int]()
        self._lock = Lock()

    def serve(self, request: BaseHTTPRequestHandler) -> None:
        time.sleep(self.latency)
        status, headers, data = self.forward(request)
        with self._lock:
            self.requests += 1
            if request.command == "GET":
                self.sent[request.path] = self.sent.get(request.path, 0) + len(data)
        self.reply(request, status, headers, data)


def make_store(home: Path) -> Path:
    """Of one document per sample."""
    teacher, corpus, store = teachers.llama(home / "teacher"), home / "corpus.jsonl", home / "store"
    corpus.write_text("\n".join(json.dumps({"text": teachers.text_of(WORDS, i)}) for i in range(DOCUMENTS)))
    command = [str(BIN / "distily-cache"), "generate", str(teacher), str(corpus), "--out", str(store)]
    command += ["--engine", "transformers", "--hidden-layers", "2", "--shard-tokens", "2048"]
    subprocess.run([*command, "--max-seq-len", str(WORDS + 1)], check=True)
    return store


def needed(store: Path, samples: int) -> int:
    """Bytes of the files of samples and distributions that the first samples of the epoch lie in."""
    reader = CacheReader.open(store)
    block = -(-len(reader) // reader.shards)
    order = EpochOrder(reader.manifest_digest, SEED, 0, len(reader), block)[:samples]
    opened = FeatureStore.open(store)
    tasks = opened.inventory().holding(reader.sample_ids[index] for index in order)
    commits = opened.commits()
    used = [records for group, records in commits.items() if not group.startswith("hidden")]
    return sum(size for records in used for task in tasks for size, _ in records[task].files.values())


def row(name: str, summary: dict[str, Any], line: Line | None, bytes_needed: int) -> list[str]:
    rate = f"{summary['tokens_per_second']:,.0f}"
    if line is None:
        return [name, rate, "", "", "", f"{bytes_needed / 1e6:.1f}"]
    parts = sum(size for path, size in line.sent.items() if "/parts/" in path)
    rest = sum(line.sent.values()) - parts
    return [
        name,
        rate,
        f"{line.requests:,}",
        f"{rest / 1e6:.1f}",
        f"{parts / 1e6:.1f}",
        f"{bytes_needed / 1e6:.1f}",
    ]


def runs(home: Path, store: Path, endpoint: str, bucket: Bucket) -> list[list[str]]:
    """Each length of training from each place."""
    whole, rows = DOCUMENTS // BATCH, []
    url = Path(bucket.url("store"))
    for steps in (whole // 10, whole):
        flags, wanted = (*FLAGS, "--max-steps", str(steps)), needed(store, steps * BATCH)
        local = train(home / f"out-{len(rows)}", *flags, cache=store)
        rows.append(row(f"{steps} steps, directory", local, None, wanted))
        for latency in (0.0, 0.03):
            bucket.forget()
            for copies in ("no copies", "copies"):
                with Line(endpoint, latency).running() as line:
                    os.environ["AWS_ENDPOINT_URL"] = line.url
                    summary = train(home / f"out-{len(rows)}", *flags, cache=url)
                name = f"{steps} steps, bucket {1000 * latency:.0f} ms away, {copies}"
                rows.append(row(name, summary, line, wanted))
                print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Make a store, put it into a bucket and train."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        store = make_store(home)
        size = sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
        with running(home / "server.log") as endpoint:
            os.environ.update(environment(endpoint, home / "mirrors"))
            bucket = Bucket(endpoint, "cold-mirror-bucket", home / "mirrors")
            bucket.upload(store, "store")
            rows = runs(home, store, endpoint, bucket)
    header = ["training", "tokens/s", "requests", "MB of records and the like", "MB of shards", "MB needed"]
    intro = (__doc__ or "").split("\n", 2)[2].strip()
    body = f"{intro}\n\nThe store has {size / 1e6:.1f} MB.\n\n{table(header, rows)}"
    write_result("cold_mirror", "Training from an object store", body)


if __name__ == "__main__":
    main()
