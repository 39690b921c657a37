"""What a training computes in and where: what the machine does fast, said in a line, and flags win."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from student.config import precision
from student.config.parser import parse
from student.config.precision import choose
from student.errors import UserError

Run = Callable[..., tuple[int, str, str]]
AVX2 = {"float32": 1.0, "bfloat16": 7.2}
EVEN = {"float32": 1.0, "bfloat16": 0.9}
AMX = {"float32": 1.0, "bfloat16": 0.3}
SMALL = ("--student-model-config", '{"num_hidden_layers": 1}', "--max-steps", 1, "--report-to", "none")
SMALL += ("--eval-fraction", 0.25)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, float]], None]:
    """Sets what was measured on this machine."""
    return lambda seconds: monkeypatch.setattr(precision, "product_times", lambda: seconds)


@pytest.mark.parametrize(
    ("seconds", "flags", "bf16", "words"),
    [
        (AVX2, (), False, ["float32", "7.2 times slower", "--bf16"]),
        (EVEN, (), False, ["float32", "1.1 times faster"]),
        (AMX, (), True, ["bfloat16 autocast", "3.3 times faster", "--no-bf16"]),
        (AVX2, ("--bf16",), True, ["as asked", "7.2 times slower", "--no-bf16"]),
        (AMX, ("--no-bf16",), False, ["float32"]),
        (AMX, ("--no_bf16",), False, ["float32"]),
        (AMX, ("--bf16", "False"), False, ["float32"]),
    ],
)
def test_a_cpu_trains_in_what_it_does_fast(
    machine: Callable[[dict[str, float]], None],
    tmp_path: Path,
    seconds: dict[str, float],
    flags: tuple[str, ...],
    bf16: bool,
    words: list[str],
) -> None:
    machine(seconds)
    request = parse(["STORE", "--output-dir", str(tmp_path), *flags])
    assert request.training.bf16 is bf16
    assert request.training.mixed_precision == ("bf16" if bf16 else "no")
    (line,) = request.notes
    assert all(word in line for word in words), line


def test_a_gpu_trains_in_bfloat16_and_tf32_where_it_is_fast() -> None:
    def on_gpu(asked: bool | None, fp16: bool = False, capability: tuple[int, int] = (9, 0)) -> Any:
        chosen = choose(asked, fp16=fp16, on="cuda", capability=capability)
        return chosen.bf16, chosen.tf32

    assert on_gpu(None) == (True, True)
    assert on_gpu(False) == (False, True)
    assert on_gpu(None, fp16=True) == (False, True)
    assert on_gpu(None, capability=(7, 5)) == (False, False)


def test_the_choice_is_shown_and_used(
    machine: Callable[[dict[str, float]], None],
    distily_train: Run,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used: list[torch.dtype] = []
    linear = torch.nn.functional.linear

    def noted(*args: Any, **kwargs: Any) -> Any:
        result = linear(*args, **kwargs)
        used.append(result.dtype)
        return result

    machine(AMX)
    monkeypatch.setattr(torch.nn.functional, "linear", noted)
    # The start of a copy is measured in float32, before anything is trained.
    code, _, err = distily_train(cache, "--output-dir", tmp_path, *SMALL, "--copy-layers", "uniform")
    assert code == 0 and "training in bfloat16 autocast" in err.splitlines()[0]
    assert set(used) == {torch.bfloat16}


def test_float16_on_a_cpu_is_refused(distily_train: Run, cache: Path, tmp_path: Path) -> None:
    code, _, err = distily_train(cache, "--output-dir", tmp_path / "out", *SMALL, "--fp16")
    assert code == 2 and "--fp16" in err and "GPU" in err and len(err.splitlines()) == 1


def test_one_process_uses_one_gpu(
    distily_train: Run, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two GPUs visible and no launcher Trainer would put nn.DataParallel around the model."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    flags = (*SMALL, "--use-cpu", "False")
    code, _, err = distily_train(cache, "--output-dir", tmp_path, *flags)
    assert code == 0, err
    assert "one of 2 GPUs" in err and "accelerate launch --multi_gpu --num_processes 2" in err
    assert parse(["STORE", "--output-dir", str(tmp_path), "--use-cpu", "False"]).training.n_gpu == 1


def fake_nvidia_smi(folder: Path, driver: str) -> str:
    """PATH on which `nvidia-smi` lists a GPU."""
    folder.mkdir()
    script = folder / "nvidia-smi"
    script.write_text(
        f'#!/bin/sh\ncase "$1" in -L) echo "GPU 0: NVIDIA H100 (UUID: GPU-1)";; *) echo {driver};; esac\n'
    )
    script.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees the GPU")
def test_a_gpu_that_torch_does_not_see_is_not_passed_over(
    distily: Run, trained: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", fake_nvidia_smi(tmp_path / "bin", "550.90.07"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    student = shutil.copytree(trained, tmp_path / "student")  # eval writes its record into it
    commands: list[tuple[object, ...]] = [
        ("from-cache", cache, "--output-dir", tmp_path / "out", *SMALL),
        ("eval", student, "--cache", cache),
        ("generate", student, "--prompt", "the teacher"),
    ]
    for words in commands:
        code, _, err = distily(*words)
        lines = [line for line in err.splitlines() if line.startswith("distily-train: ")]
        assert (code, len(lines)) == (2, 1), (words, err)
        assert "NVIDIA H100" in lines[0] and "550.90.7" in lines[0] and "580" in lines[0], lines
        assert "CUDA 12" in lines[0] and "CUDA_VISIBLE_DEVICES=" in lines[0]
    assert not (tmp_path / "out").exists()
    assert distily(*commands[0], "--use-cpu")[0] == 0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for words in commands[1:]:
        assert distily(*words)[0] == 0


def test_a_new_driver_is_not_called_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setenv("PATH", fake_nvidia_smi(tmp_path / "bin", "580.65.06"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(UserError, match=r"NVIDIA H100 \(driver 580.65.6\), but torch sees no GPU"):
        precision.find_gpu("CUDA_VISIBLE_DEVICES=")


def test_models_run_in_bfloat16_only_where_it_is_fast(machine: Callable[[dict[str, float]], None]) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU runs in the type that is saved")
    machine(AVX2)
    assert (precision.inference_dtype("bfloat16"), precision.inference_dtype("float32")) == ("float32",) * 2
    machine(AMX)
    assert precision.inference_dtype("bfloat16") == "bfloat16"


def test_setup_compares_the_driver(tmp_path: Path) -> None:
    """A driver below 580 runs no CUDA 13, which the wheels need; setup says what to do before it installs."""
    import subprocess

    root = Path(__file__).parents[2]
    environment = os.environ | {
        "PATH": fake_nvidia_smi(tmp_path / "bin", "550.90.07"),
        "VENV": str(tmp_path / "venv"),
        "PYTHON": sys.executable,
    }
    for accelerator in ("auto", "cuda"):
        done = subprocess.run(
            ["bash", str(root / "scripts" / "setup.sh")],
            env=environment | {"ACCELERATOR": accelerator},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 2 and "550" in done.stderr and "580" in done.stderr, done.stderr
        assert "ACCELERATOR=cpu" in done.stderr and not (tmp_path / "venv").exists()
