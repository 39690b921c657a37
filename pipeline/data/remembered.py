"""What a portion of a data set was cut into the last time, so that a repeat need not tokenise it again.

Kept on this machine, beside the conversions of `datasets`; a store knows nothing of it, and it may be deleted
at any time. The name is a hash of everything that samples are made of: the documents themselves, tokenizer,
template, flags, the versions of the libraries and our own code.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from distily.datafiles import digest_of
from featurestore.identity import canonical_json, digest
from pipeline.data import bad_rows, chat_layouts, chats, cutting, samples, tokens
from pipeline.data.bad_rows import BadRows, Unusable
from pipeline.data.cutting import Cut, Cutting
from pipeline.data.samples import LeftOut

# What does not change the samples of a cutting, or is named by its content.
_NOT_OF_SAMPLES = ("teacher", "template_flag")
_LIBRARIES = ("transformers", "tokenizers", "jinja2")
_CODE = (bad_rows, chat_layouts, chats, cutting, samples, tokens)


class Memory:
    """What is remembered of portions that are cut in one way.

    Samples have to be made by `cutting` with `tokenizer`.
    """

    def __init__(self, cutting: Cutting, tokenizer: Any) -> None:
        how = {
            name: value for name, value in vars(cutting).items() if name not in ("teacher", "template_flag")
        }
        made_of = {
            "cutting": how,
            "vocabulary": [cutting.teacher.tokenizer_digest, cutting.teacher.vocab_size],
            # Also what is set on the tokenizer when it is loaded, beside its files.
            "special": [str(tokenizer.special_tokens_map), str(tokenizer.chat_template)],
            "libraries": [importlib.metadata.version(name) for name in _LIBRARIES],
            "code": [digest_of(Path(str(module.__file__))) for module in _CODE],
        }
        self._how = canonical_json(made_of)

    def key_of(self, values: Sequence[tuple[str, Any]]) -> str:
        """The name of a portion: a hash of its documents, and of how they are cut."""
        return digest(_content(self._how, values))

    def recall(self, key: str, limit: int | None = None) -> Cut | None:
        """What was remembered under a key, without the samples; None where nothing was, where it cannot be
        read, or where it has more than `limit` samples, which would have ended the cutting.
        """
        try:
            with np.load(_file(key), allow_pickle=False) as kept:
                ids, lengths = kept["ids"].tolist(), kept["lengths"].tolist()
                told = json.loads(kept["left_out"].item())
            wanted = [(sample.decode("ascii"), length) for sample, length in zip(ids, lengths, strict=True)]
            left_out = LeftOut(**{field.name: int(told[field.name]) for field in fields(LeftOut)})
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        if limit is not None and len(wanted) >= limit:
            return None
        return Cut(wanted=wanted, left_out=left_out, bad=BadRows(left_out.bad_rows))

    def remember(self, key: str, cut: Cut) -> None:
        """Keep it; where that cannot be done, the next request is only slower."""
        file = _file(key)
        beside = file.with_name(f"{os.getpid()}-{file.name}")
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            with beside.open("wb") as target:
                np.savez_compressed(
                    target,
                    ids=np.array([sample for sample, _ in cut.wanted], dtype="S32"),
                    lengths=np.array([length for _, length in cut.wanted], dtype=np.int64),
                    left_out=np.array(json.dumps(asdict(cut.left_out))),
                )
            beside.replace(file)


def _content(how: bytes, values: Sequence[tuple[str, Any]]) -> Iterator[bytes]:
    yield how
    for _, value in values:
        known = ["unusable", value.reason] if isinstance(value, Unusable) else ["document", value]
        # What is no JSON is a row that cannot be used.
        yield b"\n" + json.dumps(known, default=repr).encode("ascii")


def _file(key: str) -> Path:
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "distily-cache" / "portions" / f"{key}.npz"
