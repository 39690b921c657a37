"""A GPU that the driver lists and torch does not see: the capture says so, and does not begin on the CPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.command import call
from tests.teachers import text_of


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees the GPU")
@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_generate_does_not_pass_over_a_gpu(
    tmp_path: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    fake = tmp_path / "bin" / "nvidia-smi"
    fake.parent.mkdir()
    fake.write_text(
        '#!/bin/sh\ncase "$1" in -L) echo "GPU 0: NVIDIA L4 (UUID: GPU-1)";; *) echo 535.183.01;; esac\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    data, store = tmp_path / "text.txt", tmp_path / "store"
    data.write_text(text_of(100))
    words = ("generate", tiny_teacher, data, "--out", store, "--engine", engine, "--max-seq-len", 64)
    done = call("distily-cache", *words, code=2)
    assert done.stderr.count("\n") == 1
    for word in ("NVIDIA L4", "535.183.1", "580", "CUDA 12", 'CUDA_VISIBLE_DEVICES=""'):
        assert word in done.stderr
    assert not store.exists()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    if engine == "transformers":
        call("distily-cache", *words)
