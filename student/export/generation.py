"""Talking to a student, as training saved it or as an hf-bitnet export; weights stay packed in memory."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from student.config.precision import inference_device
from student.errors import UserError
from student.export import bitblas
from student.export.reading import load_packed
from student.export.reference import integer_linears
from student.export.source import open_source, quantization_of, read_config
from student.modeling.saving import attention, stop_tokens, student_config
from student.modeling.tokenizer import load_tokenizer
from student.modeling.whole import load_whole

KERNELS = ("torch", "bitblas")


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """temperature: 0 takes the best token. chat: put the prompt into the tokenizer's chat template."""

    directory: Path
    prompt: str
    max_new_tokens: int = 64
    temperature: float = 0.0
    chat: bool = True
    kernel: str = "torch"
    seed: int = 0


def generate(request: GenerationRequest) -> dict[str, Any]:
    """The continuation and what it took; UserError for a request that cannot be served.

    Rates are of new tokens per second, the prompt's pass included; sizes in bytes: `weight_bytes` of all
    parameters and buffers as they lie in memory, `peak_memory_bytes` of the process or the GPU.
    """
    _check(request)
    device = inference_device()
    tokenizer = student_tokenizer(request.directory)
    model = load(request.directory)
    if request.kernel == "bitblas":
        if not any(True for _ in integer_linears(model)):
            raise UserError(f"--kernel bitblas: {request.directory} has no ternary weights")
        bitblas.use_bitblas(model)
    else:
        model.to(device)
    ids_1T = prompt_ids(tokenizer, request.prompt, request.chat).to(model.device)
    if ids_1T.shape[1] == 0:
        raise UserError("--prompt has no tokens; give some text")
    torch.manual_seed(request.seed)
    started = time.perf_counter()
    output = _continue(model, ids_1T, tokenizer, request)
    seconds = time.perf_counter() - started
    new = output[0, ids_1T.shape[1] :]
    return {
        "prompt_tokens": ids_1T.shape[1],
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "new_tokens": len(new),
        "seconds": seconds,
        "tokens_per_second": len(new) / seconds,
        "weight_bytes": weight_bytes(model),
        "peak_memory_bytes": _peak_memory(model),
    }


def load(directory: Path) -> Any:
    """The model in float32 and in evaluation mode; ternary matrices packed."""
    kind = quantization_of(read_config(directory))
    if kind == "latent":
        return open_source(directory).model
    if kind == "packed":
        return load_packed(directory)
    if kind == "none":
        from transformers import AutoConfig

        kind_of_attention = attention(AutoConfig.from_pretrained(directory, trust_remote_code=False))
        return load_whole(directory, str(directory), dtype=torch.float32, **kind_of_attention)
    raise UserError(
        f"{directory} is quantised with {kind}; generate reads what training saved and hf-bitnet exports"
    )


def weight_bytes(model: Any) -> int:
    """Bytes of all parameters and buffers, tied ones once."""
    tensors = {one.data_ptr(): one for one in (*model.parameters(), *model.buffers())}
    return sum(one.numel() * one.element_size() for one in tensors.values())


def _check(request: GenerationRequest) -> None:
    if request.kernel not in KERNELS:
        raise UserError(f"--kernel {request.kernel}: choose one of {', '.join(KERNELS)}")
    if request.kernel == "bitblas":
        bitblas.require()
    if request.max_new_tokens < 1:
        raise UserError("--max-new-tokens must be at least 1")
    if request.temperature < 0:
        raise UserError("--temperature must not be negative; 0 takes the best token")


def student_tokenizer(directory: Path) -> Any:
    """Of a student's directory; UserError when there is none."""
    config = student_config(read_config(directory))  # transformers would warn of a model type that is ours
    if not (directory / "tokenizer_config.json").is_file():
        raise UserError(f"{directory} holds no tokenizer; copy the teacher's tokenizer files there")
    return load_tokenizer(directory, config=config)


def prompt_ids(tokenizer: Any, prompt: str, chat: bool) -> Tensor:
    """Ids int64 [1, T] of a prompt, with `chat` in the tokenizer's chat template, where it has one."""
    if chat and tokenizer.chat_template:
        turns = [{"role": "user", "content": prompt}]
        encoded = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    ids: Tensor = encoded["input_ids"]
    return ids


@torch.no_grad()
def _continue(model: Any, ids_1T: Tensor, tokenizer: Any, request: GenerationRequest) -> Tensor:
    sampling: dict[str, Any] = {"do_sample": False}
    if request.temperature:
        sampling = {"do_sample": True, "temperature": request.temperature}
    output: Tensor = model.generate(
        ids_1T,
        attention_mask=torch.ones_like(ids_1T),
        max_new_tokens=request.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=stop_tokens(request.directory) or None,
        **sampling,
    )
    return output


def _peak_memory(model: Any) -> int:
    if model.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
