"""`generate --data-parallel`: what each engine sees of the machine, one store, and engines that die."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featurestore.maintenance.verify import verify_store
from featurestore.reader import CacheReader
from featurestore.store import FeatureStore
from pipeline.errors import RequestError
from pipeline.generate.parallel import shares
from tests import teachers
from tests.command import call, command, spawn
from tests.stores import contents
from tests.teachers import text_of

SAMPLES = 200
two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two engines need two cores")


@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 12), st.integers(1, 20))
def test_every_engine_has_its_own_part_of_the_machine(engines: int, each: int, gpus: int, cores: int) -> None:
    names = [f"GPU-{index:x}" for index in range(gpus)]
    if engines * each > gpus > 0 or (gpus == 0 and engines > cores):
        with pytest.raises(RequestError, match=f"--data-parallel {engines}: .*give"):
            shares(engines, each, names, range(cores))
        return
    made = shares(engines, each, names, range(cores))
    assert len(made) == engines
    if gpus:
        used = [name for share in made for name in share.gpus.split(",")]
        assert len(set(used)) == len(used) == engines * each and set(used) <= set(names)
    else:
        assert sorted(core for share in made for core in share.cores) == list(range(cores))
        assert max(len(share.cores) for share in made) - min(len(share.cores) for share in made) <= 1


@pytest.fixture
def request_(tmp_path: Path) -> tuple[object, ...]:
    """A request of 50 shards."""
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join(json.dumps({"text": text_of(60, seed)}) for seed in range(SAMPLES)))
    flags = ("--engine", "transformers", "--max-seq-len", 64, "--shard-tokens", 250, "--hidden-layers", 1)
    return teachers.llama(tmp_path / "teacher"), corpus, *flags


@two_cores
def test_two_engines_make_the_store_of_one(request_: tuple[object, ...], tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    call("distily-cache", "generate", *request_, "--out", one)
    flags = ("--data-parallel", 2, "--json")
    done = json.loads(spawn("distily-cache", "generate", *request_, "--out", two, *flags).stdout)
    assert verify_store(two, deep=True).sound
    assert contents(one) == contents(two)
    runs = FeatureStore.open(two).provenance()
    assert len(runs) == 2 and sum(run["tokens"] for run in runs) == done["tokens"] == SAMPLES * 60


@two_cores
def test_what_a_dead_engine_had_taken_is_left_to_the_next_command(
    request_: tuple[object, ...], tmp_path: Path
) -> None:
    for attempt in range(6):  # until the one that is killed is found at work
        store = tmp_path / f"store-{attempt}"
        code, lines = killed(request_, store)
        done = json.loads(call("distily-cache", "generate", *request_, "--out", store, "--json").stdout)
        assert int(sum(CacheReader.open(store).lengths)) == SAMPLES * 60
        if done["tokens"] > 0:
            break
    assert 0 < done["tokens"] < SAMPLES * 60
    assert code == 1
    assert any(line.startswith("distily-cache: the engine on cores ") for line in lines), lines


def killed(request_: tuple[object, ...], store: Path) -> tuple[int, list[str]]:
    """Kill one of two engines after the first commit: the command's exit code and lines."""
    words = command("distily-cache", "generate", *request_, "--out", store, "--data-parallel", 2)
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    while not list(store.glob("commit/logits-*/*.json")):
        assert process.poll() is None
        time.sleep(0.02)
    children = psutil.Process(process.pid).children()
    engines = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    assert len(engines) == 2
    max(engines, key=lambda engine: sum(engine.cpu_times()[:2])).send_signal(signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert not any(child.is_running() for child in engines)
    return process.returncode, err.splitlines()
