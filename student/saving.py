"""Writing a student so that `from_pretrained` loads it, and loading its weights back into a running
training.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from student import bitnet
from student.errors import StudentError
from student.weights import CheckpointTensors

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)


# In a checkpoint: the manifest of the cache that it was trained on, and in which order, see student.resume.
MANIFEST_FILE = "cache_manifest.json"


def save_student(student: Any, directory: Path, tokenizer_dir: Path) -> None:
    """Safetensors, config.json and the teacher's tokenizer files.

    A BitNet student is saved as its latent weights with the `quantization_config` that makes transformers
    quantise them online; it is added to the file only, since Trainer treats a model that carries it as
    already quantised.
    """
    student.save_pretrained(directory)
    if any(True for _ in bitnet.bit_linears(student)):
        path = directory / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config["quantization_config"] = bitnet.quantization_config(student)
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for name in TOKENIZER_FILES:
        source = tokenizer_dir / name
        if source.is_file() and not (directory / name).is_file():
            shutil.copyfile(source, directory / name)


def load_student(student: Any, directory: Path) -> None:
    """Load the weights that `save_student` wrote; StudentError unless they are exactly this student's.

    Tied parameters are stored once and stay tied.
    """
    state = {}
    for file in CheckpointTensors(directory).files:
        state.update(load_file(directory / file))
    own = {name for name, _ in student.named_parameters()}
    if own - set(state):
        raise StudentError(f"{directory}: the checkpoint lacks {sorted(own - set(state))[0]} of this student")
    try:
        result = student.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise StudentError(f"{directory}: the checkpoint is of another student: {error}") from error
    if result.unexpected_keys:
        raise StudentError(
            f"{directory}: the checkpoint has {result.unexpected_keys[0]}, this student has not"
        )
