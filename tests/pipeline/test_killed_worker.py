"""A vLLM process is killed at work: one line, no process left, and the second start completes."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from featurestore.reader import CacheReader
from tests import teachers
from tests.pipeline.test_generate_cli import command, run, text_of

SAMPLES, LENGTH = 160, 250
# Wide enough a vocabulary to take a few seconds, so that the kill finds it at work.
VOCABULARY = 32_000


@pytest.mark.vllm
@pytest.mark.parametrize("victim", ["VLLM::EngineCore", "VLLM::Worker"])
def test_a_kill_is_reported_and_the_same_command_completes(victim: str, tmp_path: Path) -> None:
    teacher, store = teachers.llama(tmp_path / "teacher", vocab_size=VOCABULARY), tmp_path / "store"
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join(json.dumps({"text": text_of(LENGTH, seed)}) for seed in range(SAMPLES)))
    arguments = ("generate", teacher, corpus, "--out", store, "--max-seq-len", 256, "--shard-tokens", 2000)
    log = tmp_path / "stderr.txt"
    with log.open("w") as stderr:
        process = subprocess.Popen(command(*arguments), stderr=stderr, env=os.environ)
        while process.poll() is None and not list(store.glob("commit/logits-*/*.json")):
            time.sleep(0.05)
        tree = psutil.Process(process.pid).children(recursive=True)
        next(one for one in tree if victim in " ".join(one.cmdline())).kill()
        code = process.wait(timeout=120)
    lines = log.read_text().splitlines()
    assert code == 1, lines
    assert lines[-1].startswith("distily-cache: ") and "worker died" in lines[-1]
    assert not any("Traceback" in line for line in lines)
    # multiprocessing's own resource tracker notices last that its master is gone.
    assert not psutil.wait_procs(tree, timeout=30)[1]
    done = json.loads(run(*arguments, "--json").stdout)
    assert 0 < done["tokens"] < SAMPLES * LENGTH == int(sum(CacheReader.open(store).lengths))
    run("verify", store, "--deep")
