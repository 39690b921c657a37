"""Two processes, with packed rows and projectors, train what one process does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]


def test_two_processes_take_the_steps_of_one(cache: Path, tmp_path: Path) -> None:
    """The loss is a mean over the learned positions of the global batch, however ranks and rows divide it."""
    narrow = '{"hidden_size": 32, "head_dim": 16, "num_hidden_layers": 2}'
    arguments = [str(cache), "--student-model-config", narrow, "--init", "random", "--hidden-loss", "mse"]
    arguments += ["--hidden-weight", "0.05", "--projector", "linear", "--max_steps", "3", "--save_steps", "3"]
    arguments += ["--optim", "sgd", "--learning-rate", "0.1", "--warmup_steps", "0", "--max_grad_norm", "0"]
    arguments += ["--eval-fraction", "0", "--report-to", "none", "--disable_tqdm", "True"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ranks = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    for name, launcher, batch in (("one", [], ["8"]), ("two", ranks, ["4", "--pack-rows"])):
        command = [sys.executable, "-m", *launcher, "student.cli", "from-cache", *arguments]
        command += ["--output-dir", str(tmp_path / name), "--per-device-train-batch-size", *batch]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("report.html") == 1
    for file in ("model", "projectors"):
        one, two = (
            load_file(tmp_path / run / "checkpoint-3" / f"{file}.safetensors") for run in ("one", "two")
        )
        for key, tensor in one.items():
            torch.testing.assert_close(two[key], tensor, rtol=1e-4, atol=1e-5, msg=key)
