"""A model's directory as vLLM has to see it: without weights that are not the model's."""

from __future__ import annotations

import tempfile
from pathlib import Path

from distily.checkpoint.weights import unused_weights


def without_unused_weights(directory: Path) -> tempfile.TemporaryDirectory[str] | None:
    """A directory of links to all files but the safetensors that the model does not consist of; None where
    there are none of these.

    Without an index vLLM loads every `*.safetensors` of a directory, one over the other, and
    `consolidated*.safetensors` make it read another configuration.
    """
    unused = unused_weights(directory)
    if not unused:
        return None
    links = tempfile.TemporaryDirectory(prefix="distily-model-")
    for file in directory.iterdir():
        if file not in unused:
            (Path(links.name) / file.name).symlink_to(file.absolute())
    return links
