"""What a request's data set was cut into the last time, so that a covered request need not tokenise again.

Kept on this machine, beside the conversions of `datasets`; a store knows nothing of it, and it may be deleted
at any time. The name is a hash of everything that samples are made of: the content of the data, tokenizer,
template, flags, the versions of the libraries and our own code.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from distily.datafiles import digest_of
from featurestore.identity import canonical_json, digest
from pipeline.data import bad_rows, chat_layouts, chats, json_rows, samples, tables, tokens
from pipeline.data import documents as texts
from pipeline.data.samples import LeftOut
from pipeline.request.generate import GenerateRequest
from pipeline.teacher.checkpoint import Teacher

# Flags that say what is done with samples, and with which teacher; any other may change what they are.
_NOT_OF_SAMPLES = (
    "teacher",
    "dataset",
    "out",
    "chat_template",
    "top_k",
    "top_p",
    "tail",
    "temperatures",
    "hidden_layers",
    "hidden_dtype",
    "final",
    "relation_layers",
    "engine",
    "dtype",
    "teacher_load_in_8bit",
    "teacher_load_in_4bit",
    "tensor_parallel_size",
    "data_parallel",
    "max_num_batched_tokens",
    "gpu_memory_utilization",
    "shard_tokens",
    "seed",
)
_LIBRARIES = ("transformers", "tokenizers", "jinja2", "datasets")
_CODE = (bad_rows, chat_layouts, chats, json_rows, samples, tables, texts, tokens)


@dataclass(frozen=True, kw_only=True)
class Remembered:
    """The samples of a request: (id, length) of each, in order, and what was left out."""

    wanted: list[tuple[str, int]]
    left_out: LeftOut


def key_of(
    request: GenerateRequest, teacher: Teacher, tokenizer: Any, template: str | None, fingerprint: str
) -> str:
    """The name of a request. template: the text of --chat-template. fingerprint: of the data."""
    flags = {name: value for name, value in asdict(request).items() if name not in _NOT_OF_SAMPLES}
    made_of = {
        "data": fingerprint,
        "flags": flags,
        "length": request.sequence_length(teacher),
        "vocabulary": [teacher.tokenizer_digest, teacher.vocab_size],
        # Also what is set on the tokenizer when it is loaded, beside its files.
        "special": [str(tokenizer.special_tokens_map), str(tokenizer.chat_template)],
        "template": template,
        "libraries": [importlib.metadata.version(name) for name in _LIBRARIES],
        "code": [digest_of(Path(str(module.__file__))) for module in _CODE],
    }
    return digest(canonical_json(made_of))


def recall(key: str) -> Remembered | None:
    """What was remembered under a key; None where nothing was, or where it cannot be read."""
    try:
        with np.load(_file(key), allow_pickle=False) as kept:
            ids, lengths = kept["ids"].tolist(), kept["lengths"].tolist()
            left_out = json.loads(kept["left_out"].item())
        return Remembered(
            wanted=[(sample.decode("ascii"), length) for sample, length in zip(ids, lengths, strict=True)],
            left_out=LeftOut(**{field.name: int(left_out[field.name]) for field in fields(LeftOut)}),
        )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def remember(key: str, wanted: Sequence[tuple[str, int]], left_out: LeftOut) -> None:
    """Keep it; where that cannot be done, the next request is only slower."""
    file = _file(key)
    beside = file.with_name(f"{os.getpid()}-{file.name}")
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as target:
            np.savez_compressed(
                target,
                ids=np.array([sample for sample, _ in wanted], dtype="S32"),
                lengths=np.array([length for _, length in wanted], dtype=np.int64),
                left_out=np.array(json.dumps(asdict(left_out))),
            )
        beside.replace(file)


def _file(key: str) -> Path:
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "distily-cache" / "requests" / f"{key}.npz"
