"""Reading single tensors from a checkpoint's safetensors files, without building the model they belong to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from distily.checkpoint.configs import json_object
from distily.checkpoint.weights import indexed_files
from distily.errors import CheckpointError
from student.errors import UserError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


class CheckpointTensors:
    """The tensors of one checkpoint directory by name, read one at a time. `read_names` records what was
    read.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.read_names: list[str] = []
        self._file_of = _locate(directory)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    @property
    def files(self) -> list[str]:
        """Names of the files that hold the tensors."""
        return sorted(set(self._file_of.values()))

    def shapes(self, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """Shapes from the files' headers; no tensor is read."""
        shapes: dict[str, tuple[int, ...]] = {}
        for file, members in self._by_file(names).items():
            with safe_open(self.directory / file, framework="pt") as opened:
                shapes.update({name: tuple(opened.get_slice(name).get_shape()) for name in members})
        return shapes

    def dtypes(self) -> set[str]:
        """Of all tensors, in the words of safetensors' headers: F32, BF16, ..."""
        found = set()
        for file, members in self._by_file(self._file_of).items():
            with safe_open(self.directory / file, framework="pt") as opened:
                found |= {opened.get_slice(name).get_dtype() for name in members}
        return found

    def _by_file(self, names: Iterable[str]) -> dict[str, list[str]]:
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self._file_of[name], []).append(name)
        return by_file

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor on the CPU) for each of `names`, file by file."""
        for file, members in self._by_file(names).items():
            with safe_open(self.directory / file, framework="pt") as opened:
                for name in members:
                    self.read_names.append(name)
                    yield name, opened.get_tensor(name)


def _locate(directory: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index of a sharded checkpoint or from the one file's own header."""
    index, single = directory / INDEX, directory / WEIGHTS
    try:
        if index.is_file():
            # Refuses names of files elsewhere.
            absent = [file for file in indexed_files(index) if not (directory / file).is_file()]
            if absent:
                raise UserError(
                    f"{index} names {absent[0]}, which is not there; download the checkpoint again"
                )
            return dict(json_object(index)["weight_map"])
        if single.is_file():
            with safe_open(single, framework="pt") as opened:
                return dict.fromkeys(opened.keys(), WEIGHTS)
    except (CheckpointError, KeyError, SafetensorError) as error:
        raise UserError(f"the weights in {directory} cannot be read: {error}") from error
    raise UserError(
        f"no safetensors weights in {directory} (neither {WEIGHTS} nor {INDEX}); give a directory that has "
        "them "
        "with --teacher DIR, or start from random weights with --init random"
    )
