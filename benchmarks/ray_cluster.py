"""`generate --ray` on two Ray nodes of this machine, of which an engine and then a node are killed.

    python -m benchmarks.ray_cluster

Two raylets with one core each on loopback (`ray.cluster_utils.Cluster`), the demo teacher in transformers,
two engines. One engine gets SIGKILL after the first third of the shards is committed, one raylet with all
that runs on it after the second third. The store is compared, bit for bit, with that without Ray.

Work is done twice in two ways: two engines capture a shard to its end, which the records tell, and a killed
engine was at some, of which it has two at most: one in capture, and one that is committed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.common import table, write_result
from featurestore.reader import CacheReader
from featurestore.store import FeatureStore
from pipeline.demo import materialise_teacher, write_text
from pipeline.generate.cluster import SHARDS_AT_ONCE

LENGTH, SHARD = 64, 64
# Two engines are killed, each with as many shards as it is given at a time.
MADE_TWICE = 2 * SHARDS_AT_ONCE


def command(teacher: Path, text: Path, store: Path, samples: int, *more: object) -> list[str]:
    flags = ["--engine", "transformers", "--max-seq-len", LENGTH, "--num-samples", samples]
    flags += ["--shard-tokens", SHARD, "--hidden-layers", 15, "--dtype", "float32", "--json"]
    return ["distily-cache", "generate", *map(str, [teacher, text, "--out", store, *flags, *more])]


def contents(store: Path) -> dict[bytes, bytes]:
    """Every bit of the features of each sample, by its tokens."""
    reader = CacheReader.open(store)
    found = {}
    for index in range(len(reader)):
        sample = reader.read(index)
        values = (value for features in sample.features.values() for value in vars(features).values())
        found[sample.tokens.tobytes()] = b"".join(np.asarray(value).tobytes() for value in values)
    return found


def commits(store: Path) -> int:
    return len(list(store.glob("commit/samples/*.json")))


def wait_for(store: Path, count: int, process: subprocess.Popen[str]) -> None:
    while commits(store) < count and process.poll() is None:
        time.sleep(0.1)


def engines() -> list[psutil.Process]:
    return [one for one in psutil.process_iter() if "CapturingActor" in "".join(one.cmdline())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--samples", type=int, default=440)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "distily-ray")
    given = parser.parse_args()
    teacher = materialise_teacher(given.work / "teacher")
    text = write_text(given.work / "topics.jsonl")
    one, many = given.work / "one", given.work / "many"
    began = time.monotonic()
    done = subprocess.run(
        command(teacher, text, one, given.samples), check=True, capture_output=True, text=True
    )
    alone, single = json.loads(done.stdout), time.monotonic() - began
    shards = commits(one)
    seen = on_two_nodes(teacher, text, many, given.samples, shards)
    records = FeatureStore.open(many).commits()["samples"].values()
    spent: dict[str, int] = {}
    for record in records:
        if record.run is not None:
            spent[record.run.id] = max(spent.get(record.run.id, 0), record.run.tokens)
    rows = sum(record.rows for record in records)
    again = sum(spent.values()) - rows
    facts = [
        [f"shards of at most {SHARD} positions", str(shards)],
        ["without Ray", f"{single:.0f} s, of them {alone['capture_seconds']:.0f} s of capture"],
        ["with Ray, both kills included", f"{seen['seconds']:.0f} s"],
        ["engine processes in all", str(len(spent))],
        ["the store is the same, bit for bit", "yes" if contents(one) == contents(many) else "NO"],
        ["captured to the end and then again", f"{again} of {rows} positions"],
        ["in the making at the two kills, at most", f"{MADE_TWICE} shards, {MADE_TWICE / shards:.1%}"],
        ["of an engine, between a shard and the next: median", f"{seen['idle'] * 1e3:.0f} ms"],
        ["the same without Ray", f"{idle_seconds(one) * 1e3:.0f} ms"],
    ]
    write_result(
        "ray_cluster",
        "A capture on two Ray nodes, with kills",
        table(["", ""], facts),
        "python -m benchmarks.ray_cluster",
    )


def on_two_nodes(teacher: Path, text: Path, store: Path, samples: int, shards: int) -> dict[str, Any]:
    """Run the command on two raylets, and kill an engine and a raylet."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    began = time.monotonic()
    more = ("--ray", cluster.address, "--workers", 2)
    process = subprocess.Popen(command(teacher, text, store, samples, *more), text=True)
    wait_for(store, shards // 3, process)
    os.kill(engines()[0].pid, signal.SIGKILL)
    wait_for(store, 2 * shards // 3, process)
    cluster.remove_node(second, allow_graceful=False)
    code = process.wait()
    seconds = time.monotonic() - began
    cluster.shutdown()
    if code:
        raise SystemExit(f"the command ended with code {code}")
    return {"seconds": seconds, "idle": idle_seconds(store)}


def idle_seconds(store: Path) -> float:
    """Of each shard of an engine, how long after the one before it was committed, less its own capture."""
    runs: dict[str, list[tuple[float, float]]] = {}
    for name, record in FeatureStore.open(store).commits()["samples"].items():
        if record.run is not None:
            when = (store / "commit" / "samples" / f"{name}.json").stat().st_mtime
            runs.setdefault(record.run.id, []).append((when, record.run.capture_seconds))
    gaps = []
    for shards in runs.values():
        shards.sort()
        gaps += [b[0] - a[0] - (b[1] - a[1]) for a, b in pairwise(shards)]
    return float(np.median(gaps)) if gaps else 0.0


if __name__ == "__main__":
    main()
