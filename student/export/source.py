"""The student that is exported: its directory, its configuration, its model with integer layers."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distily.checkpoint.configs import json_object
from student.bitnet import layout
from student.errors import UserError
from student.export.reference import integer_linears, to_integers
from student.modeling.saving import load_student
from student.modeling.tokenizer import copy_tokenizer


@dataclass(frozen=True)
class ExportSource:
    """`model` computes the integer reference; `config` is the model's own, without `quantization_config`."""

    directory: Path
    config: dict[str, Any]
    model: Any

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Name of each ternary layer -> (output features, input features)."""
        return {name: (one.out_features, one.in_features) for name, one in integer_linears(self.model)}

    def copy_tokenizer(self, out: Path) -> None:
        """Tokenizer files, chat templates and generation settings."""
        copy_tokenizer(self.directory, out)
        generation = self.directory / "generation_config.json"
        if generation.is_file():
            shutil.copyfile(generation, out / generation.name)


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a model's directory; UserError when there is none."""
    path = directory / "config.json"
    if not path.is_file():
        raise UserError(f"{directory} holds no config.json; give the --output-dir of a training")
    return json_object(path)


def quantization_of(config: dict[str, Any]) -> str:
    """ "none", "latent" (a BitNet student as training saves it), "packed" (an hf-bitnet export), or
    the name of another method.
    """
    entry = config.get("quantization_config")
    if entry is None:
        return "none"
    if entry.get("quant_method") != "bitnet":
        return str(entry.get("quant_method"))
    return "latent" if entry.get("quantization_mode") == "online" else "packed"


def open_source(directory: Path) -> ExportSource:
    """Load a BitNet student that training saved; UserError when the directory holds anything else."""
    config = read_config(directory)
    kind = quantization_of(config)
    if kind == "none":
        raise UserError(
            f"{directory} is a full-precision student, which has no ternary weights to export; train one "
            "with --student-model-as-bitnet"
        )
    if kind != "latent":
        raise UserError(
            f"{directory} is quantised already ({kind}); give the --output-dir of the training, which has "
            "the latent weights"
        )
    model = load_student(directory)
    to_integers(model)
    own = layout.from_saved(config)
    del own["quantization_config"]
    return ExportSource(directory, own, model)
