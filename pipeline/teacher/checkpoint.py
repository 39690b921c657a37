"""The teacher before it is loaded: where it is, what it is, and the digests that identify it."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from blake3 import blake3

from distily.checkpoint.configs import json_object
from distily.checkpoint.finite import not_finite
from distily.checkpoint.weights import (
    INDEX,
    count_numbers,
    read_tensors,
    refuse_pointer,
    weight_files,
    weight_patterns,
)
from distily.errors import CheckpointError
from distily.text import one_line
from featurestore.errors import StoreFormatError
from featurestore.format.schema import TeacherIdentity
from featurestore.format.tokenizer_files import (
    TOKENIZER_FILES,
    TOKENIZER_PATTERNS,
    tokenizer_digest,
    tokenizer_files,
)
from featurestore.identity import canonical_json
from pipeline.errors import RequestError
from pipeline.teacher.coverage import check_coverage

# What a config may say of where it came from, not of what it computes.
_VOLATILE_CONFIG = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")
_NO_LIMIT = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A teacher checkpoint on disk.

    `vocab_size` is the config's, rows that pad the LM head included, until `without_padding` has cut it.
    `max_position` is the longest sequence its config allows (2**31 - 1 when it names no limit);
    `config_dtype` the torch dtype name that it was saved in.
    """

    name: str
    path: Path
    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    max_position: int
    config_dtype: str
    quantization: str
    digest: str
    tokenizer_digest: str

    def identity(self, engine: str, engine_version: str, dtype: str, quantization: str) -> TeacherIdentity:
        """What a store says of the teacher whose numbers, computed so, are in it."""
        return TeacherIdentity(
            name=self.name if not Path(self.name).is_dir() else str(self.path),
            architecture=self.architecture,
            digest=self.digest,
            tokenizer_digest=self.tokenizer_digest,
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            max_position=self.max_position,
            engine=engine,
            engine_version=engine_version,
            dtype=dtype,
            quantization=quantization,
        )


def load_teacher(name: str, trust_remote_code: bool = False, with_weights: bool = True) -> Teacher:
    """Describe the checkpoint `name`, a local directory or a hub name, without loading its weights.

    Without `with_weights` only config and tokenizer are needed, and the digest is of the config alone.

    Raises:
        RequestError: it cannot be found, is not a causal LM checkpoint, or has no safetensors weights.
    """
    path = _locate(name, with_weights, trust_remote_code)
    _check_small_files(path, name)
    config = read_config(path, name, trust_remote_code)
    text = config.get_text_config()
    architectures = getattr(config, "architectures", None)
    if not architectures:
        raise RequestError(
            f"TEACHER {name}: its config.json names no architecture, so it is not a model checkpoint"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise RequestError(f"TEACHER {name}: {architectures[0]} is an encoder-decoder; a causal LM is needed")
    weights = _checked_weights(path, name, config, trust_remote_code) if with_weights else []
    try:
        tokenizer = tokenizer_files(path)
    except StoreFormatError as error:
        raise RequestError(f"TEACHER {name}: a chat template's file cannot be kept: {error}") from None
    if not tokenizer:
        raise RequestError(f"TEACHER {name}: no tokenizer files in {path}; save its tokenizer there")
    quantization = getattr(config, "quantization_config", None) or {}
    return Teacher(
        name=name,
        path=path,
        architecture=architectures[0],
        vocab_size=_positive(text, "vocab_size", name),
        hidden_size=_positive(text, "hidden_size", name),
        num_layers=_positive(text, "num_hidden_layers", name),
        max_position=int(getattr(text, "max_position_embeddings", 0) or _NO_LIMIT),
        config_dtype=_dtype_name(getattr(config, "dtype", None) or getattr(text, "dtype", None)),
        quantization=str(quantization.get("quant_method", "none"))
        if isinstance(quantization, dict)
        else "none",
        digest=_weights_digest(path, weights),
        tokenizer_digest=tokenizer_digest(tokenizer),
    )


def teacher_files(teacher: Teacher) -> dict[str, bytes]:
    """The small files that stage 2 needs from the teacher: its config and its tokenizer."""
    configs = [teacher.path / name for name in ("config.json", "generation_config.json")]
    return {file.name: file.read_bytes() for file in configs if file.is_file()} | tokenizer_files(
        teacher.path
    )


def count_parameters(teacher: Teacher) -> int:
    """Numbers in the checkpoint's tensors, from the headers of its files; packed weights count as stored."""
    return count_numbers(read_tensors(weight_files(teacher.path)))


def without_padding(teacher: Teacher, tokenizer: Any) -> Teacher:
    """The teacher with the vocabulary of its tokenizer: ids beyond the tokenizer's largest are no tokens.

    Checkpoints pad the LM head to round sizes, models of one family to different ones. What such a row gives
    was never trained to mean anything.
    """
    return replace(teacher, vocab_size=min(teacher.vocab_size, 1 + max(tokenizer.get_vocab().values())))


def _locate(name: str, with_weights: bool, trust_remote_code: bool) -> Path:
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise RequestError(f"TEACHER {name}: not a model directory, it has no config.json")
        return path.resolve()
    if path.exists():
        raise RequestError(f"TEACHER {name}: is a file; give the directory of a checkpoint or a hub name")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise RequestError(f"TEACHER {name}: no such directory")
    return _download(name, with_weights, trust_remote_code)


def _download(name: str, with_weights: bool, trust_remote_code: bool) -> Path:
    """The snapshot of a hub model with what is used of it: code only where it may run, and of the weights
    those that the index names, not other formats and precisions of the same ones.
    """
    from huggingface_hub import snapshot_download

    small = ["config.json", "generation_config.json", *TOKENIZER_PATTERNS]
    code = ["*.py"] if trust_remote_code else []
    try:
        path = Path(snapshot_download(name, allow_patterns=[*small, *code, INDEX]))
        if not with_weights:
            return path
        # The same commit, should the branch have moved meanwhile.
        return Path(snapshot_download(name, revision=path.name, allow_patterns=weight_patterns(path)))
    except CheckpointError as error:
        raise RequestError(f"TEACHER {name}: {error}") from None
    except Exception as error:  # network, authentication and naming errors share no base class
        raise RequestError(
            f"TEACHER {name}: neither a local directory nor a model that the hub gives us: {one_line(error)}"
        ) from error


def read_config(path: Path, name: str, trust_remote_code: bool) -> Any:
    """The checkpoint's configuration, as transformers reads it; RequestError when it does not."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # a broken config raises anything from KeyError to OSError
        hint = "" if trust_remote_code else " (a model with code of its own needs --trust-remote-code)"
        raise RequestError(
            f"TEACHER {name}: not a model that transformers knows: {one_line(error)}{hint}"
        ) from error


def _check_small_files(path: Path, name: str) -> None:
    """RequestError where a file beside the weights is a Git LFS pointer, as large tokenizers may be."""
    try:
        for file in (path / small for small in ("config.json", "generation_config.json", *TOKENIZER_FILES)):
            if file.is_file():
                refuse_pointer(file)
    except CheckpointError as error:
        raise RequestError(f"TEACHER {name}: {error}") from None


def _checked_weights(path: Path, name: str, config: Any, trust_remote_code: bool) -> list[Path]:
    """The files of the weights; RequestError unless they give all weights of the model, in finite numbers."""
    try:
        files = weight_files(path)
        tensors = read_tensors(files)
        unused = check_coverage(config, tensors, trust_remote_code)
    except (CheckpointError, RequestError) as error:
        raise RequestError(f"TEACHER {name}: {error}") from error
    wrong = not_finite({tensor: stored for tensor, stored in tensors.items() if tensor not in unused})
    if wrong:
        raise RequestError(
            f"TEACHER {name}: {wrong[0]} in {tensors[wrong[0]].file} holds numbers that are not finite"
            + (f", as do {len(wrong) - 1} more tensors" if len(wrong) > 1 else "")
            + "; the checkpoint is damaged, or its training diverged: download it again, or give "
            "an earlier one"
        )
    return files


def _positive(config: Any, field: str, name: str) -> int:
    value = getattr(config, field, None)
    if not isinstance(value, int) or value < 1:
        raise RequestError(f"TEACHER {name}: its config gives no usable {field} ({value!r})")
    return value


def _dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.") if dtype is not None else "float32"


def _weights_digest(path: Path, weights: list[Path]) -> str:
    """Hash of the weights' bytes and of the config that interprets them; names and paths do not enter."""
    config = json_object(path / "config.json")
    meaning = {key: value for key, value in config.items() if key not in _VOLATILE_CONFIG}
    digest = blake3(canonical_json(meaning))
    for file in weights:
        hasher = blake3(max_threads=blake3.AUTO)
        hasher.update_mmap(os.fspath(file))
        digest.update(hasher.digest())
    return str(digest.hexdigest())
