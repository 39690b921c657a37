"""`generate --ray`: real Ray on this machine, two engines, one of which is killed; the store is the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from featurestore.maintenance.verify import verify_store
from pipeline.data import portions as reading
from tests.command import cli, generate
from tests.pipeline.test_streaming import FLAGS
from tests.stores import contents
from tests.teachers import text_of

ROOT = Path(__file__).parents[2]
SAMPLES = 60


@pytest.mark.ray
def test_two_engines_make_the_store_of_one_though_one_is_killed(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    data, one, many = tmp_path / "data.jsonl", tmp_path / "one", tmp_path / "many"
    data.write_text("".join(json.dumps({"text": text_of(60, seed)}) + "\n" for seed in range(SAMPLES)))
    monkeypatch.setattr(reading, "PORTION_SIZE", 2000)
    generate(tiny_teacher, data, one)
    killed: list[int] = []
    killer = threading.Thread(target=kill_an_engine, args=(many, killed), daemon=True)
    killer.start()
    made = generate(tiny_teacher, data, many, "--ray", "local", "--workers", 2)
    killer.join(60)
    assert killed and verify_store(many, deep=True).sound
    assert contents(one) == contents(many)
    assert made["samples"] == SAMPLES
    assert generate(tiny_teacher, data, many)["tokens"] == 0


@pytest.mark.ray
def test_the_example_of_two_nodes_runs(tiny_teacher: Path, tmp_path: Path) -> None:
    """As docs/clusters.md has it, with the token that Ray gives a cluster."""
    pytest.importorskip("ray", reason="ray is not installed")
    data, one, two = tmp_path / "data.jsonl", tmp_path / "one", tmp_path / "two"
    data.write_text("".join(json.dumps({"text": text_of(60, seed)}) + "\n" for seed in range(8)))
    generate(tiny_teacher, data, one)
    script = ROOT / "examples" / "ray_on_loopback.sh"
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", script, tiny_teacher, data, two, *FLAGS]
    subprocess.run(list(map(str, command)), check=True, timeout=300, cwd=ROOT, env=environment)
    assert contents(one) == contents(two)


@pytest.mark.ray
def test_a_cluster_that_does_not_answer(tiny_teacher: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"text": text_of(60)}))
    store = ("--out", tmp_path / "store")
    code, _, err = cli("generate", tiny_teacher, data, *store, *FLAGS, "--ray", "127.0.0.1:9")
    assert code == 2 and "--ray 127.0.0.1:9: nothing answers there" in err.splitlines()[-1]


def kill_an_engine(store: Path, killed: list[int]) -> None:
    """SIGKILL one of the engines after the first commit."""
    while not list(store.glob("commit/samples/*.json")):
        time.sleep(0.02)
    for process in psutil.process_iter(["name", "cmdline"]):
        words = [process.info["name"], *(process.info["cmdline"] or ())]  # which a zombie lacks
        if "MapWorker(MapBatches(CapturingActor))" in " ".join(words):
            os.kill(process.pid, signal.SIGKILL)
            killed.append(process.pid)
            return


def test_without_ray_the_extra_is_named(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"text": text_of(60)}))
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    for flag in (("--ray",), ("--ray", "host:6379", "--workers", 2)):
        code, _, err = cli("generate", tiny_teacher, data, "--out", tmp_path / "store", *FLAGS, *flag)
        assert (code, err.splitlines()[-1]) == (
            2,
            "distily-cache: --ray: Ray is not installed; install the extra [ray]",
        )


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--workers", 2), "--workers 2: has no effect without --ray"),
        (("--gpus-per-worker", 0.5), "--gpus-per-worker 0.5: has no effect without --ray"),
        (("--ray", "--data-parallel", 2), "--data-parallel 2: not together with --ray"),
        (("--ray", "--gpus-per-worker", 1.5), "--gpus-per-worker 1.5: a share from 0 to 1"),
    ],
)
def test_flags_that_mean_nothing_are_refused(tmp_path: Path, flags: tuple[object, ...], line: str) -> None:
    code, _, err = cli("generate", "./teacher", "./data", "--out", tmp_path, *flags)
    assert code == 2 and line in err
