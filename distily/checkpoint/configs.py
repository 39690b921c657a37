"""The JSON files of a checkpoint, a student or a store's teacher: read within bounds, and only as objects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distily.errors import CheckpointError
from distily.safety.parsing import read_json


def json_object(path: Path) -> dict[str, Any]:
    """The object in a file such as config.json or tokenizer.json; empty where there is no file.

    Raises:
        CheckpointError: the file cannot be read, is too large or too deep, or holds no JSON object.

    Example: `json_object(directory / "generation_config.json").get("eos_token_id")`
    """
    if not path.is_file():
        return {}
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}; get the file again") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds no JSON object; get the file again")
    return found
