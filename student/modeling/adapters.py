"""PEFT adapters on a student in full precision: put on, saved and loaded as PEFT does."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from student.errors import StudentError, UserError
from student.modeling.tokenizer import copy_tokenizer


def add_adapters(student: Any, peft_config: Any) -> Any:
    """The student as a `PeftModel`, of which only the adapters are trained.

    Args:
        student: a transformers model.
        peft_config: of PEFT, e.g. `LoraConfig(task_type="CAUSAL_LM")`.

    Raises:
        UserError: PEFT is not installed, or these adapters would not be seen by the loss.
    """
    if not find_spec("peft"):
        raise UserError("peft_config: needs the package peft; install the extra [peft]")
    from peft import get_peft_model
    from peft.tuners.tuners_utils import BaseTuner

    head = student.get_output_embeddings()
    if getattr(peft_config, "is_prompt_learning", False):
        raise UserError(
            f"peft_config: {peft_config.peft_type.value} puts tokens in front of the text, where cached "
            "features have none; take adapters of weights, such as LoRA"
        )
    adapted = get_peft_model(student, peft_config)
    if not isinstance(adapted.base_model, BaseTuner) or adapted.get_output_embeddings() is not head:
        raise UserError(
            "peft_config: the loss reads the weights of the LM head itself, so it cannot be adapted; leave "
            "it out of target_modules and modules_to_save"
        )
    return adapted


def has_adapters(student: Any) -> bool:
    """Whether a student is a `PeftModel`."""
    if not find_spec("peft"):
        return False
    from peft import PeftModel

    return isinstance(student, PeftModel)


def save_adapters(student: Any, directory: Path, tokenizer_dir: Path) -> None:
    """Write adapter_config.json, adapter_model.safetensors and the teacher's tokenizer."""
    student.save_pretrained(directory)
    copy_tokenizer(tokenizer_dir, directory)


def load_adapters(student: Any, directory: Path) -> None:
    """Load what `save_adapters` wrote; StudentError where it is not all of this student's adapters."""
    from peft import load_peft_weights, set_peft_model_state_dict

    result: Any = set_peft_model_state_dict(student, load_peft_weights(str(directory), device="cpu"))
    lacking = [name for name in result.missing_keys if ".lora_" in name or "modules_to_save" in name]
    if lacking or result.unexpected_keys:
        raise StudentError(
            f"{directory}: the adapters are of another student ({[*lacking, *result.unexpected_keys][0]})"
        )
