"""vLLM killed at work, its command killed, and stopped: no process left, and the last start completes."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from featurestore.reader import CacheReader
from featurestore.store import FeatureStore
from tests import teachers
from tests.command import call, fork
from tests.teachers import text_of

Tree = list[psutil.Process]

SAMPLES, LENGTH = 140, 250
# Wide enough a vocabulary to take a few seconds, so that the kill finds it at work.
VOCABULARY = 32_000
# The promise is 5 seconds; a machine that runs other tests on all of its cores may schedule us later.
STOP_SECONDS = 10.0


@pytest.mark.vllm
def test_kills_are_reported_and_the_same_command_completes(tmp_path: Path) -> None:
    """The worker is killed, at the next start the command, the third is stopped; the fourth completes."""
    teacher, store = teachers.llama(tmp_path / "teacher", vocab_size=VOCABULARY), tmp_path / "store"
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join(json.dumps({"text": text_of(LENGTH, seed)}) for seed in range(SAMPLES)))
    arguments = ("generate", teacher, corpus, "--out", store, "--max-seq-len", 256, "--shard-tokens", 2000)
    kill_the_worker(arguments, store, tmp_path / "stderr.txt")
    kill_the_command(arguments, store, tmp_path / "stderr.txt")
    stop_at_work(arguments, store, tmp_path / "stderr.txt")
    kept = {file: file.read_bytes() for file in store.glob("commit/*/*.json")}
    last = fork("distily-cache", *arguments, stderr=tmp_path / "stderr.txt")
    last.join()
    assert last.exitcode == 0, (tmp_path / "stderr.txt").read_text()
    (run,) = FeatureStore.open(store).provenance()
    assert 0 < run["tokens"] < SAMPLES * LENGTH == int(sum(CacheReader.open(store).lengths))
    assert {file: file.read_bytes() for file in kept} == kept
    call("distily-cache", "verify", store, "--deep")


def at_work(
    arguments: tuple[object, ...], store: Path, log: Path, strike: Callable[[Tree], None], seconds: float
) -> tuple[int, list[str], Tree]:
    """Starts the command and strikes after its first commit: exit code, lines on stderr, its processes."""
    before = committed(store)
    process = fork("distily-cache", *arguments, stderr=log)
    while process.is_alive() and committed(store) == before:
        time.sleep(0.05)
    driver = psutil.Process(process.pid)
    tree = [driver, *driver.children(recursive=True)]
    strike(tree)
    process.join(timeout=seconds)
    assert process.exitcode is not None, "it has not ended"
    return process.exitcode, log.read_text().splitlines(), tree[1:]


def kill_the_worker(arguments: tuple[object, ...], store: Path, log: Path) -> None:
    """Of the engine's processes the one that computes; those above it end with it."""

    def strike(tree: Tree) -> None:
        next(one for one in tree if "VLLM::Worker" in " ".join(one.cmdline())).kill()

    code, lines, tree = at_work(arguments, store, log, strike, seconds=120)
    assert code == 1, lines
    assert lines[-1].startswith("distily-cache: ") and "worker died" in lines[-1]
    assert not any("Traceback" in line for line in lines)
    assert not psutil.wait_procs(tree, timeout=30)[1]


def kill_the_command(arguments: tuple[object, ...], store: Path, log: Path) -> None:
    """SIGKILL, of which nobody is told: the engine's processes notice by themselves."""
    code, _, tree = at_work(arguments, store, log, lambda tree: tree[0].kill(), STOP_SECONDS)
    assert code == -9
    assert tree, "vLLM runs in a process of its own"
    # Without their parent they may stay in the process table, where nobody collects their exit codes.
    left = psutil.wait_procs(tree, timeout=20)[1]
    assert all(one.status() == psutil.STATUS_ZOMBIE for one in left), "the engine outlived the command"


def stop_at_work(arguments: tuple[object, ...], store: Path, log: Path) -> None:
    """SIGTERM in the middle of a step: one line says what is kept, and no process is left."""
    code, lines, tree = at_work(arguments, store, log, lambda tree: tree[0].terminate(), STOP_SECONDS)
    assert code == 143, lines
    assert re.fullmatch(
        r"distily-cache: terminated; [\d,]+ of 35,000 tokens are committed and kept, "
        r"the same command resumes there",
        lines[-1],
    )
    assert not any("Traceback" in line for line in lines)
    assert not psutil.wait_procs(tree, timeout=STOP_SECONDS)[1]


def committed(store: Path) -> int:
    return len(list(store.glob("commit/logits-*/*.json")))
