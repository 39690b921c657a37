"""The weights of a model checkpoint: which files they are, what the files' headers say, and what is wrong.

Only headers are parsed here, and only as bytes; no file is unpickled and no model is built. Both stages ask
the same function for the files of a checkpoint, so that identity, sidecar and training mean the same weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from blake3 import blake3

from distily.errors import CheckpointError
from distily.safety.parsing import parse_json, read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
_EXPERT = re.compile(r"(.*\bexperts\.)(\d+)(\..*)")
_LFS = b"version https://git-lfs"
# safetensors' own limit of a header.
_MAX_HEADER = 100_000_000
_AGAIN = "download the checkpoint again (`hf download`, or `git lfs pull` in a clone)"


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor of a safetensors file; dtype in the words of its header. It lies at bytes [start, end)."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that make up the model, sorted by name.

    These are the files that `model.safetensors.index.json` names, else `model.safetensors`. Other formats and
    precisions beside them (`consolidated*`, `*.fp16.*`, `original/`) are of no concern.

    Raises:
        CheckpointError: there are none, or some are missing; the line says which and what to do.
    """
    index, single = directory / INDEX, directory / SINGLE
    if index.is_file():
        names = indexed_files(index)
        if single.is_file() and SINGLE not in names:
            raise CheckpointError(
                f"{directory} holds two models, {SINGLE} and the files that {INDEX} names, and libraries "
                "disagree on which to load; remove one of them"
            )
    elif single.is_file():
        names = [SINGLE]
    else:
        _refuse_without_weights(directory)
    absent = [name for name in names if not (directory / name).is_file()]
    if absent:
        raise CheckpointError(f"{directory} lacks {_some(absent)}{_why_absent(directory)}; {_AGAIN}")
    return [directory / name for name in names]


def weights_digest(directory: Path) -> str:
    """blake3 of the files of a model's weights: what is said of other weights does not belong beside these.

    Raises:
        CheckpointError: as `weight_files`.
    """
    digest = blake3()
    for file in weight_files(directory):
        digest.update_mmap(file)
    return digest.hexdigest()


def weight_patterns(directory: Path) -> list[str]:
    """What to download of a checkpoint's weights, where its index lies in `directory` already if it has one:
    the files that `weight_files` will ask for. CheckpointError for an index that is none.
    """
    index = directory / INDEX
    return indexed_files(index) if index.is_file() else [SINGLE]


def unused_weights(directory: Path) -> list[Path]:
    """The safetensors files in a directory that are not the model's weights, sorted; CheckpointError where
    those are not there.
    """
    return sorted(set(directory.glob("*.safetensors")) - set(weight_files(directory)))


def indexed_files(index: Path) -> list[str]:
    """The names of the files in an index, sorted. CheckpointError for what is no such index."""
    refuse_pointer(index)
    try:
        names = sorted(set(read_json(index, _MAX_HEADER)["weight_map"].values()))
        if not names or not all(re.fullmatch(r"[^/\\]+\.safetensors", name) for name in names):
            raise ValueError("it names no safetensors files beside it")
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(f"{index} is not an index of safetensors files ({error}); {_AGAIN}") from None
    return names


def read_tensors(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Every tensor of the files by name, from their headers.

    Raises:
        CheckpointError: a file is a Git LFS pointer, is cut off, or is not a safetensors file.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        tensors |= _read_header(file)
    return tensors


def refuse_pointer(file: Path) -> None:
    """CheckpointError where a file is what Git leaves in place of a large one that was not downloaded."""
    with file.open("rb") as opened:
        if opened.read(len(_LFS)) == _LFS:
            raise CheckpointError(
                f"{file} is a Git LFS pointer, not the file itself; run `git lfs pull` in its directory, or "
                "`hf download` the model"
            )


def explain_gaps(
    missing: Iterable[str],
    mismatched: Mapping[str, tuple[Sequence[int], Sequence[int]]],
    stored: Iterable[str],
) -> str | None:
    """What is wrong with a checkpoint that leaves weights random, and what to do; None if nothing.

    missing: names of the model's weights that the files do not give. mismatched: name -> shape in the files,
    shape in the model. stored: names in the files.
    """
    lacking, names = sorted(missing), list(stored)
    if lacking:
        return (
            f"the checkpoint lacks {_some(lacking)} of its model, which would be random numbers; "
            f"{_likely(lacking, names)}"
        )
    if mismatched:
        name, (theirs, ours) = min(mismatched.items())
        return (
            f"{name} is {_times(theirs)} in the checkpoint but {_times(ours)} in a model of its config.json, "
            f"and {len(mismatched)} weights would be random numbers; give the config.json that was saved "
            "with the weights"
        )
    return None


def packed_weights(missing: Iterable[str], extra: Iterable[str]) -> set[str]:
    """Those of the missing weights that a quantised checkpoint holds in packed form, under other names.

    Quantisers replace `X.weight` with tensors such as `X.qweight`, `X.weight_packed` or `X_blocks`. extra:
    names in the checkpoint that the unquantised model does not have.
    """
    starts: set[str] = set()
    for name in extra:
        starts |= {name[:at] for at, letter in enumerate(name) if letter in "._"}
    return {name for name in missing if name in starts or name.rpartition(".")[0] in starts}


def missing_experts(stored: Iterable[str]) -> list[str]:
    """Names that are missing among numbered experts: all of a layer have the same tensors."""
    numbers: dict[str, set[str]] = {}
    endings: dict[str, set[str]] = {}
    names = set(stored)
    for name in names:
        if match := _EXPERT.fullmatch(name):
            numbers.setdefault(match[1], set()).add(match[2])
            endings.setdefault(match[1], set()).add(match[3])
    expected = {
        f"{layer}{number}{ending}"
        for layer, every in numbers.items()
        for number in every
        for ending in endings[layer]
    }
    return sorted(expected - names)


def count_numbers(tensors: Mapping[str, StoredTensor]) -> int:
    """Numbers in the tensors; packed weights count as stored."""
    return sum(math.prod(tensor.shape) for tensor in tensors.values())


def _refuse_without_weights(directory: Path) -> NoReturn:
    """CheckpointError that says what a directory without index and single file holds instead."""
    names = sorted(file.name for file in directory.glob("*.safetensors"))
    totals = {int(match[2]) for name in names if (match := _SHARD.fullmatch(name))}
    if len(totals) == 1:
        total = totals.pop()
        shards = [f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]
        absent = [shard for shard in shards if shard not in names]
        raise CheckpointError(
            f"{directory} holds {next(shard for shard in shards if shard in names)} but lacks "
            f"{_some([*absent, INDEX])}, and shards do not load without their index"
            f"{_why_absent(directory)}; {_AGAIN}"
        )
    if totals:
        raise CheckpointError(
            f"{directory} holds shards of several models and no {INDEX} that says which; {_AGAIN}"
        )
    if (directory / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{directory} holds an adapter (PEFT), not a model; merge it into its base model and save that"
        )
    if any(_unfinished(directory)):
        raise CheckpointError(f"{directory} holds no weights{_why_absent(directory)}; {_AGAIN}")
    others = [*names, *(file.name for file in sorted(directory.glob("*.bin")))]
    found = f" (it has {_some(others)})" if others else ""
    raise CheckpointError(
        f"no safetensors weights named {SINGLE} or model-*-of-*.safetensors in {directory}{found}; pickled "
        "weights and other formats are never loaded, convert the checkpoint with save_pretrained first"
    )


def _unfinished(directory: Path) -> Iterable[Path]:
    """What the hub's client leaves of a file while it is downloaded, in a directory or in its cache."""
    yield from directory.glob("*.incomplete")
    yield from directory.glob(".cache/huggingface/download/*.incomplete")
    if directory.parent.name == "snapshots":
        yield from (directory.parent.parent / "blobs").glob("*.incomplete")


def _why_absent(directory: Path) -> str:
    return ": its download was not completed" if any(_unfinished(directory)) else ""


def _read_header(file: Path) -> dict[str, StoredTensor]:
    refuse_pointer(file)
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or (2 <= length <= _MAX_HEADER and length > size - 8):
            raise CheckpointError(f"{file} is cut off after {size:,} bytes; {_AGAIN}")
        if not 2 <= length <= _MAX_HEADER:
            raise CheckpointError(f"{file} is not a safetensors file; {_AGAIN}")
        header = opened.read(length)
    try:
        entries = parse_json(header, _MAX_HEADER)
        entries.pop("__metadata__", None)
        tensors = {name: _stored(file, entry, 8 + length) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{file} is not a safetensors file: its header is damaged; {_AGAIN}") from None
    end = max((tensor.end for tensor in tensors.values()), default=8 + length)
    if end > size:
        raise CheckpointError(f"{file} is cut off: it has {size:,} of {end:,} bytes; {_AGAIN}")
    return tensors


def _stored(file: Path, entry: Mapping[str, Any], data: int) -> StoredTensor:
    (start, end), shape = entry["data_offsets"], tuple(entry["shape"])
    if not all(isinstance(number, int) and number >= 0 for number in (start, end, *shape)) or start > end:
        raise ValueError("sizes and offsets are not counts")
    return StoredTensor(file=file, dtype=str(entry["dtype"]), shape=shape, start=data + start, end=data + end)


def _likely(missing: Sequence[str], stored: Sequence[str]) -> str:
    """What a checkpoint with such gaps looks like, and what to do."""
    for prefix, what in (
        ("_orig_mod.", "saved from a model that torch.compile had wrapped"),
        ("module.", "saved from a model that DataParallel or DDP had wrapped"),
        ("base_model.model.", "saved from a model that PEFT had wrapped"),
    ):
        if any(name.startswith(prefix) for name in stored):
            return (
                f"its names begin with {prefix!r}, so it was {what}; save the model inside it with "
                "save_pretrained"
            )
    if heads := [
        name for name in stored if name.split(".")[0] in ("score", "classifier", "v_head", "value_head")
    ]:
        return (
            f"it looks like a reward model or a classifier ({heads[0]}), which predicts no tokens; give the "
            "causal language model"
        )
    if all(name.split(".")[0] in ("lm_head", "embed_out", "output") for name in missing):
        return (
            "it looks like a base model without its LM head, or its weights are tied and config.json says "
            "otherwise; save it as a causal language model, or correct tie_word_embeddings in config.json"
        )
    return "save the whole model with save_pretrained, or download it again"


def _some(names: Sequence[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _times(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "a number"
