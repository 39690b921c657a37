"""The example commands of Distily's README, split at the cache: what is left for `from-cache`, word for word.

Teacher and data flags (--teacher_model_name_or_path, --teacher_load_in_8bit) go to `distily-cache generate`.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., tuple[int, str, str]]

COMMANDS = {
    "qwen2": """
        --hub_model_id "lapp0/distily_experiments_control"
        --push_to_hub True
        --report_to tensorboard
        --per_device_eval_batch_size 4
        --per_device_train_batch_size 8
        --gradient_accumulation_steps 8
    """,
    "phi3": """
        --student_model_as_bitnet True
        --hub_model_id "lapp0/phi-3-mini-4k-instruct_distily"
        --per_device_train_batch_size 1
        --per_device_eval_batch_size 1
        --eval_strategy steps
        --eval_steps 2000
        --logging_steps 4
        --num_train_epochs 1
        --lr_scheduler_type cosine
        --learning_rate 5e-5
        --max_grad_norm 64.0
        --gradient_checkpointing True
        --optim paged_adamw_32bit
        --save_steps 2000
        --push_to_hub True
        --report_to tensorboard
        --eval_on_start True
    """,
    "gpt2": """
        --student_model_as_bitnet False
        --hub_model_id "lapp0/gpt2_bf16_distily"
        --per_device_train_batch_size 16
        --eval_strategy steps
        --eval_steps 2000
        --logging_steps 4
        --num_train_epochs 1
        --lr_scheduler_type cosine
        --learning_rate 5e-5
        --max_grad_norm 64.0
        --gradient_checkpointing True
        --optim paged_adamw_32bit
        --save_steps 2000
        --push_to_hub True
        --report_to tensorboard
        --eval_on_start True
    """,
}


def words(name: str) -> list[str]:
    return COMMANDS[name].replace('"', "").split()


@pytest.mark.parametrize("name", COMMANDS)
def test_they_train_to_the_end_when_nothing_is_pushed(
    name: str, distily_train: Run, cache: Path, tmp_path: Path
) -> None:
    """Without a GPU bitsandbytes runs the paged optimizer as one that is not paged."""
    flags = (*words(name), "--push_to_hub", "False", "--eval-fraction", 0.25, "--json")
    code, out, err = distily_train(cache, "--output_dir", tmp_path, *flags)
    assert code == 0, err
    summary = json.loads(out)
    assert summary["steps"] >= 1 and math.isfinite(summary["last_eval"]["eval_loss"])
    assert (summary["sizes"]["ternary_parameters"] > 0) is (name == "phi3")
    assert list(tmp_path.rglob("events.out.tfevents*"))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_push_that_cannot_be_is_refused_before_anything_is_done(
    name: str, distily_train: Run, cache: Path, tmp_path: Path
) -> None:
    flags = (*words(name), "--hub_token", "hf_not_a_token", "--eval-fraction", 0.25)
    code, out, err = distily_train(cache, "--output_dir", tmp_path / "out", *flags)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1 and "--push-to-hub" in err and "hf auth login" in err
    assert not (tmp_path / "out").exists()


def test_a_hub_that_does_not_answer_refuses_a_push(cache: Path, tmp_path: Path) -> None:
    """In a process of its own: the hub's client reads where the hub is when it is imported."""
    away = os.environ | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    flags = (*words("qwen2"), "--hub_token", "hf_not_a_token", "--output_dir", tmp_path / "out")
    command = [sys.executable, "-m", "student.cli", "from-cache", cache, *flags]
    done = subprocess.run(
        [*map(str, command)], env=away, capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1 and "--push-to-hub" in done.stderr
    assert not (tmp_path / "out").exists()
