"""`eval --prompts`: student and teacher continue the same texts, and how fast each of them writes.

Both take their most likely token at every step, one prompt at a time, in this process, after each other. So
no seed plays a part, and the rates compare: same library, same threads, nothing beside them.

Shape letters: T tokens of a prompt.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from distily.checkpoint.weights import weight_files
from distily.datafiles import read_text
from distily.errors import DataFileError
from distily.system.machine import cpu_name
from student.errors import UserError
from student.evaluation.models import Side
from student.evaluation.request import PromptOptions
from student.export.generation import prompt_ids, weight_bytes
from student.modeling.saving import stop_tokens
from student.modeling.whole import local_checkpoint

NEW_TOKENS = 64


def read_prompts(file: Path) -> list[str]:
    """The lines of a text file that are not blank, as they stand there; UserError where there are none."""
    try:
        text = read_text(file)
    except DataFileError as error:
        raise UserError(f"--prompts {file}: cannot be read: {error}") from error
    # Not str.splitlines, which also cuts at form feeds and at Unicode's separators: those are text.
    prompts = [line for line in text.split("\n") if line.strip()]
    if not prompts:
        raise UserError(f"--prompts {file}: holds no prompt; write one on each line")
    return prompts


def encode(prompts: Sequence[str], side: Side, options: PromptOptions) -> list[Tensor]:
    """Ids int64 [1, T] of each prompt as this side reads it; UserError for one that it cannot continue."""
    if options.chat and not side.tokenizer.chat_template:
        raise UserError(f"--chat: the tokenizer of {side.source} has no chat template; leave the flag out")
    new = options.max_new_tokens or NEW_TOKENS
    encoded = []
    for number, prompt in enumerate(prompts, 1):
        ids_1T = prompt_ids(side.tokenizer, prompt, options.chat)
        length = ids_1T.shape[1]
        if length == 0:
            raise UserError(f"--prompts {options.file}: prompt {number} has no tokens for {side.source}")
        if side.positions is not None and length + new > side.positions:
            raise UserError(
                f"--prompts {options.file}: prompt {number} has {length:,} tokens, and with --max-new-tokens "
                f"{new:,} they are more than the {side.positions:,} positions of {side.source}; shorten it"
            )
        encoded.append(ids_1T)
    return encoded


@torch.no_grad()
def measure(model: Any, side: Side, encoded: Sequence[Tensor], options: PromptOptions) -> dict[str, Any]:
    """{continuations, new_tokens, seconds, tokens_per_second, dtype, weight_bytes, checkpoint_bytes} of one
    model. Seconds are of all prompts, their own pass included; sizes are of the weights in memory, and of
    the checkpoint on disk.

    A continuation is {text, prompt_tokens, new_tokens, ended}: `ended` where the model ended the text.
    """
    directory = local_checkpoint(side.source, side.source)
    stops = stop_tokens(directory)
    # A checkpoint may bring settings of its own, a penalty of repetitions for instance.
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=stops or None, pad_token_id=stops[0] if stops else 0
    )
    new = options.max_new_tokens or NEW_TOKENS
    _generate(model, encoded[0], 2)  # the first pass allocates, and chooses kernels
    started = time.perf_counter()
    written = [_generate(model, ids_1T, new) for ids_1T in encoded]
    seconds = time.perf_counter() - started
    count = sum(map(len, written))
    return {
        "continuations": [
            {
                "text": _text(side.tokenizer, ids_1T[0].tolist(), tokens, stops),
                "prompt_tokens": ids_1T.shape[1],
                "new_tokens": len(tokens),
                "ended": tokens[-1] in stops,
            }
            for ids_1T, tokens in zip(encoded, written, strict=True)
        ],
        "new_tokens": count,
        "seconds": seconds,
        "tokens_per_second": count / seconds,
        "dtype": str(model.dtype).removeprefix("torch."),
        "weight_bytes": weight_bytes(model),
        "checkpoint_bytes": sum(file.stat().st_size for file in weight_files(directory)),
    }


def machine(device: torch.device) -> dict[str, Any]:
    """On what the rates were measured: {device, threads}, threads of a CPU only."""
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), "threads": None}
    return {"device": cpu_name(), "threads": torch.get_num_threads()}


def _generate(model: Any, ids_1T: Tensor, new: int) -> list[int]:
    """The ids of the tokens that follow; a list, so that a GPU is waited for."""
    ids_1T = ids_1T.to(model.device)
    output = model.generate(ids_1T, attention_mask=torch.ones_like(ids_1T), max_new_tokens=new)
    tokens: list[int] = output[0, ids_1T.shape[1] :].tolist()
    return tokens


def _text(tokenizer: Any, prompt: list[int], new: list[int], stops: Sequence[int]) -> str:
    """What the new tokens add to the prompt; special ones are shown, but for the one that ends the text."""
    new = new[:-1] if new[-1] in stops else new
    before, whole = (
        str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)) for ids in (prompt, prompt + new)
    )
    # A prompt that ends within a letter is decoded otherwise once the letter is whole.
    return whole.removeprefix(before) if whole.startswith(before) else str(tokenizer.decode(new))
