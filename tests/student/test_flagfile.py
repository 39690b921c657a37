"""Flags written in YAML mean what they mean on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from student.config.flagfile import command_line
from student.config.parser import parse
from student.errors import UserError


def test_a_mapping_is_the_command_line_it_stands_for(tmp_path: Path) -> None:
    flags = {
        "learning_rate": 1e-3,
        "bf16": True,
        "student-model-config": {"num_hidden_layers": 2},
        "copy-layers": [0, 4],
        "logits-loss": "kl",
        "student": None,
    }
    request = parse(["store", "--output-dir", str(tmp_path), *command_line(flags, "spec")])
    assert request.training.learning_rate == 1e-3
    assert request.training.bf16 is True
    assert request.options.config_changes() == {"num_hidden_layers": 2}
    assert request.options.copy_layers == "0,4"
    assert json.loads(request.options.student_model_config or "") == flags["student-model-config"]
    assert request.options.student is None


@pytest.mark.parametrize(
    ("flags", "said"),
    [({"--bf16": True}, "without dashes"), ({3: 1}, "no flag"), ({"lr": [[1]]}, "spec: lr cannot be")],
)
def test_what_can_be_no_flag_is_refused_by_name(flags: dict[Any, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        command_line(flags, "spec")
