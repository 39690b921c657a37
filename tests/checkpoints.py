"""Checkpoints as they should not be: each function takes a copy of a whole one and damages it.

The model is a Llama or a Qwen3 of tests/teachers.py, in one file.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4096\n"
Tensors = dict[str, torch.Tensor]
Damage = Callable[[Path], object]


def copy_of(whole: Path, directory: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(whole, directory))


def rewrite(directory: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Replaces the tensors of the one file."""
    tensors = change(load_file(directory / WEIGHTS))
    save_file(tensors, directory / WEIGHTS, {"format": "pt"})


def shard(directory: Path, count: int = 3) -> list[Path]:
    """Splits the one file into `count` shards with an index; returns the shards."""
    tensors = load_file(directory / WEIGHTS)
    files = [directory / f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    parts: list[Tensors] = [{} for _ in files]
    for place, name in enumerate(sorted(tensors)):
        parts[place % count][name] = tensors[name]
    for file, part in zip(files, parts, strict=True):
        save_file(part, file, {"format": "pt"})
    mapping = {name: file.name for file, part in zip(files, parts, strict=True) for name in part}
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": mapping}))
    (directory / WEIGHTS).unlink()
    return files


def configure(directory: Path, **changes: object) -> None:
    """Changes config.json."""
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def without(*names: str) -> Damage:
    """Tensors are left out."""
    return lambda path: rewrite(path, lambda all_: {name: all_[name] for name in all_ if name not in names})


def compiled(path: Path) -> None:
    rewrite(path, lambda all_: {f"_orig_mod.{name}": tensor for name, tensor in all_.items()})


def base_model(path: Path) -> None:
    def change(tensors: Tensors) -> Tensors:
        return {
            name.removeprefix("model."): one for name, one in tensors.items() if name.startswith("model.")
        }

    rewrite(path, change)


def reward_model(path: Path) -> None:
    def change(tensors: Tensors) -> Tensors:
        width = tensors["model.norm.weight"].shape[0]
        return {**_without_head(tensors), "score.weight": torch.ones(1, width)}

    rewrite(path, change)


def wrong_shape(path: Path) -> None:
    rewrite(path, lambda all_: all_ | {"model.norm.weight": torch.ones(3)})


def not_a_number(path: Path) -> None:
    def change(tensors: Tensors) -> Tensors:
        tensors["model.norm.weight"][5] = torch.nan
        return tensors

    rewrite(path, change)


def infinite(path: Path) -> None:
    def change(tensors: Tensors) -> Tensors:
        name = "model.layers.1.mlp.up_proj.weight"
        tensors[name] = tensors[name].bfloat16()
        tensors[name][2, 3] = -torch.inf
        return tensors

    rewrite(path, change)


def pointer(name: str) -> Damage:
    """A file is what Git leaves without its LFS extension."""
    return lambda path: (path / name).write_bytes(POINTER)


def cut_off(path: Path) -> None:
    data = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(data[: len(data) // 2])


def cut_in_header(path: Path) -> None:
    data = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(data[:100])


def empty(path: Path) -> None:
    (path / WEIGHTS).write_bytes(b"")


def no_safetensors(path: Path) -> None:
    (path / WEIGHTS).write_bytes(b"\xff" * 1000)


def shard_missing(path: Path) -> None:
    shard(path)[1].unlink()


def shard_missing_without_index(path: Path) -> None:
    shard(path)[1].unlink()
    (path / INDEX).unlink()


def no_index(path: Path) -> None:
    shard(path)
    (path / INDEX).unlink()


def half_downloaded(path: Path) -> None:
    """As the hub's client leaves a directory: the last file under a temporary name."""
    last = shard(path)[-1]
    temporary = path / ".cache" / "huggingface" / "download" / "abc.incomplete"
    temporary.parent.mkdir(parents=True)
    last.rename(temporary)


def nothing_downloaded(path: Path) -> None:
    (path / WEIGHTS).rename(path / "model.safetensors.incomplete")


def index_damaged(path: Path) -> None:
    shard(path)
    (path / INDEX).write_text('{"weight_map": {"lm_head')


def index_elsewhere(path: Path) -> None:
    files = shard(path)
    (path / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": f"../x/{files[0].name}"}}))


def two_models(path: Path) -> None:
    single = (path / WEIGHTS).read_bytes()
    shard(path)
    (path / WEIGHTS).write_bytes(single)


def adapter(path: Path) -> None:
    (path / WEIGHTS).rename(path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text("{}")


# What is done to an untied model -> words that the line about it has to hold.
UNTIED: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "no head": (without("lm_head.weight"), ("lm_head.weight", "tie_word_embeddings")),
    "a layer's weight": (
        without("model.layers.1.mlp.up_proj.weight"),
        ("lacks model.layers.1.mlp.up_proj.weight",),
    ),
    "compiled": (compiled, ("_orig_mod.", "torch.compile")),
    "base model": (base_model, ("lm_head.weight", "base model")),
    "reward model": (reward_model, ("lm_head.weight", "reward model", "score.weight")),
    "wrong shape": (wrong_shape, ("model.norm.weight", "3 in the checkpoint", "config.json")),
    "NaN": (not_a_number, ("model.norm.weight", "not finite")),
    "infinity": (infinite, ("model.layers.1.mlp.up_proj.weight", "not finite")),
    "LFS weights": (pointer(WEIGHTS), (WEIGHTS, "Git LFS pointer", "git lfs pull")),
    "cut off": (cut_off, (WEIGHTS, "cut off", "download")),
    "cut in header": (cut_in_header, (WEIGHTS, "cut off", "download")),
    "empty": (empty, (WEIGHTS, "cut off", "download")),
    "no safetensors": (no_safetensors, (WEIGHTS, "not a safetensors file")),
    "shard missing": (shard_missing, ("lacks model-00002-of-00003.safetensors", "download")),
    "shard missing, no index": (
        shard_missing_without_index,
        ("lacks model-00002-of-00003.safetensors", INDEX, "download"),
    ),
    "no index": (no_index, ("model-00001-of-00003.safetensors", f"lacks {INDEX}", "download")),
    "half downloaded": (half_downloaded, ("model-00003-of-00003.safetensors", "download was not completed")),
    "nothing downloaded": (nothing_downloaded, ("download was not completed",)),
    "index damaged": (index_damaged, (INDEX, "download")),
    "index elsewhere": (index_elsewhere, (INDEX, "beside it")),
    "two models": (two_models, (WEIGHTS, INDEX, "remove one")),
    "adapter": (adapter, ("adapter", "merge")),
}


def _without_head(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
