"""What training holds of the teacher: the parts of the cache's sidecar that the objective needs, frozen.

They are no modules of the student: not among its parameters, not saved with it, not sent between processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from featurestore.format import sidecar
from featurestore.format.states.transform import TRANSFORMED
from featurestore.reader import CacheReader
from student.data.decoding import Transform
from student.losses.blocks import TeacherBlock
from student.losses.full_pass import TeacherHead
from student.losses.lm_head import HeadTransform


@dataclass
class TeacherParts:
    """The LM head, in the checkpoint's own dtype, and blocks by number; None and empty where nothing needs
    them. bases: by digest, those in which the cache has final states.
    """

    head: TeacherHead | None = None
    blocks: dict[int, TeacherBlock] = field(default_factory=dict)
    bases: dict[str, Transform] = field(default_factory=dict)

    def to(self, device: torch.device) -> TeacherParts:
        """Move there, once; self."""
        if self.head is not None and self.head.weight_VD.device != device:
            bias_V = None if self.head.bias_V is None else self.head.bias_V.to(device)
            self.head = replace(self.head, weight_VD=self.head.weight_VD.to(device), bias_V=bias_V)
        for block in self.blocks.values():
            block.to(device)
        self.bases = bases_on(self.bases, device)
        return self


def load_parts(reader: CacheReader, head: bool, blocks: Iterable[int]) -> TeacherParts:
    """Read parts of the cache's sidecar; errors of `featurestore.format.sidecar` name the generate flag that
    adds one.
    """
    stored, parts = reader.sidecar(), TeacherParts(bases=load_bases(reader))
    if head:
        found = stored.head()
        weights = {name: as_torch(tensor) for name, tensor in found.tensors.items()}
        transform = HeadTransform(found.spec.logit_scale, found.spec.logit_softcap)
        parts.head = TeacherHead(weights["weight"], weights.get("bias"), transform)
    for layer in blocks:
        block = stored.block(layer)
        weights = {name: as_torch(tensor) for name, tensor in block.tensors.items()}
        parts.blocks[layer] = TeacherBlock(block.spec, weights, reader.identity.max_position)
    return parts


def load_bases(reader: CacheReader) -> dict[str, Transform]:
    """By digest, those in which the cache has final states."""
    bases = map(reader.basis, TRANSFORMED.keys() & set(reader.sidecar().parts))
    return {basis.digest: Transform.of(basis) for basis in bases}


def bases_on(bases: Mapping[str, Transform], device: torch.device) -> dict[str, Transform]:
    """The same on a device."""
    return {digest: basis.mapped(lambda tensor: tensor.to(device)) for digest, basis in bases.items()}


def as_torch(tensor: sidecar.Tensor) -> Tensor:
    """A copy in memory, of the same dtype."""
    values = torch.from_numpy(tensor.values.copy())
    return values.view(torch.bfloat16) if tensor.dtype == "bf16" else values
