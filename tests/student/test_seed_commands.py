"""The commands that the project grew from, split at the cache: their training flags train, unchanged."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Pushing to a hub, which needs one, is left out; --max_steps is added to each.
COMMANDS = {
    "qwen2": """--report_to tensorboard --per_device_eval_batch_size 4 --per_device_train_batch_size 8
        --gradient_accumulation_steps 8""",
    "phi-3": """--student_model_as_bitnet True --per_device_train_batch_size 1 --per_device_eval_batch_size 1
        --eval_strategy steps --eval_steps 2000 --logging_steps 4 --num_train_epochs 1
        --lr_scheduler_type cosine --learning_rate 5e-5 --max_grad_norm 64.0 --gradient_checkpointing True
        --optim paged_adamw_32bit --save_steps 2000 --report_to tensorboard --eval_on_start True""",
    "gpt2": """--student_model_as_bitnet False --per_device_train_batch_size 16 --eval_strategy steps
        --eval_steps 2000 --logging_steps 4 --num_train_epochs 1 --lr_scheduler_type cosine
        --learning_rate 5e-5 --max_grad_norm 64.0 --gradient_checkpointing True --optim paged_adamw_32bit
        --save_steps 2000 --report_to tensorboard --eval_on_start True""",
}


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("name", COMMANDS)
def test_the_seeds_flags_train(name: str, train: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    summary = train(tmp_path / "out", *shlex.split(COMMANDS[name]), "--max_steps", 2)
    assert summary["steps"] == 2
    assert (tmp_path / "out" / "model.safetensors").is_file()
