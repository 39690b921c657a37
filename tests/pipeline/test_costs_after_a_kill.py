"""What a killed run spent is counted, from the shards that it left; what a finished one spent, once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest

from featurestore.maintenance.info import store_info
from featurestore.reader import CacheReader
from student.training.summary import cache_cost
from tests.command import call, command
from tests.teachers import text_of

run = partial(call, "distily-cache")
OPTIONS = ("--engine", "transformers", "--max-seq-len", 64, "--shard-tokens", 128, "--top-k", 8)


def test_the_total_covers_a_killed_run(tiny_teacher: Path, tmp_path: Path) -> None:
    corpus, store = tmp_path / "corpus.jsonl", tmp_path / "store"
    corpus.write_text("\n".join(json.dumps({"text": text_of(40 + 13 * n, n)}) for n in range(24)))
    words = ("generate", tiny_teacher, corpus, *OPTIONS, "--out", store, "--json")
    process = subprocess.Popen(
        command("distily-cache", *words), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while len(list(store.glob("commit/samples/*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()

    killed = store_info(store)
    assert not killed.provenance, "the kill came too late to show anything"
    (left,) = killed.unrecorded
    # A kill between two records of a shard leaves its features without its samples.
    committed = max(group.rows for group in killed.groups.values())
    assert left["tokens"] == committed > 0
    assert left["capture_seconds"] > 0 < left["engine_seconds"]
    again = json.loads(run(*words).stdout)

    info = store_info(store)
    assert info.unrecorded == killed.unrecorded
    assert [record["tokens"] for record in info.provenance] == [again["tokens"]]
    cost = cache_cost(CacheReader.open(store), info)
    assert again["tokens"] == info.rows - killed.rows
    seconds = again["capture_seconds"] + left["capture_seconds"]
    assert cost["capture_seconds"] == pytest.approx(seconds, abs=0.01)
    assert cost["capture_tokens_per_second"] == pytest.approx(
        (again["tokens"] + left["tokens"]) / seconds, rel=0.01
    )
    assert run("info", store).stdout.count("stopped, or still at work") == 1


def test_a_finished_run_is_counted_once(tiny_teacher: Path, tmp_path: Path) -> None:
    corpus, store = tmp_path / "corpus.jsonl", tmp_path / "store"
    corpus.write_text("\n".join(json.dumps({"text": text_of(90, n)}) for n in range(4)))
    words = ("generate", tiny_teacher, corpus, *OPTIONS, "--out", store, "--json")
    done = [json.loads(run(*words, *more).stdout) for more in ((), ("--hidden-layers", 1))]
    info = store_info(store)
    assert not info.unrecorded
    cost = cache_cost(CacheReader.open(store), info)
    assert cost["capture_seconds"] == pytest.approx(sum(one["capture_seconds"] for one in done), abs=0.01)
