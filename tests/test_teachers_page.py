"""docs/teachers.md names what is tested, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM

from tests import architectures

PAGE = Path(__file__).parents[1] / "docs" / "teachers.md"


def test_the_table_lists_the_architectures_of_the_agreement_test() -> None:
    listed = re.findall(r"^\| `(\w+)` \| yes \| yes \|", PAGE.read_text(), flags=re.M)
    tested = [
        AutoModelForCausalLM._model_mapping[type(AutoConfig.for_model(kind))].__name__
        for kind in architectures.CONFIGS
    ]
    assert sorted(listed) == sorted(tested)
