"""`--torch-compile` compiles the decoder layers, each on its own.

The layers of a student are alike, so what is compiled for one serves all, and a second length of rows makes
it serve any length. What is around them changes with every batch: the number of learned positions, the chunks
of the LM head, and hooks that collect hidden states. Compiling the whole model would never come to an end.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from transformers import PreTrainedModel

from distily.system.machine import separate_compiled_code


def compile_layers(student: PreTrainedModel, plugin: TorchDynamoPlugin) -> None:
    """Let each decoder layer's `forward` run compiled, as accelerate's plugin says.

    Hooks and gradient checkpointing stay around it, and names and places of weights as they were.
    """
    if plugin.backend == DynamoBackend.NO:
        return
    separate_compiled_code()
    options: dict[str, Any] = plugin.to_kwargs()
    for layer in student.get_decoder().layers:
        layer.forward = torch.compile(layer.forward, **options)
