"""One row of bytes per position: how features cross from vLLM's worker to us.

vLLM carries a pooling result as one tensor per request. All fields of a position are laid side by side in a
`uint8 [T, C]` tensor, so that a request's features travel as a single buffer and no per-token Python object
ever exists. `RowLayout` is computed from the same `CaptureSpec` on both sides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.util import find_spec

import numpy as np
import torch

from featurestore.format.codec import HIDDEN_DTYPES, hidden_width
from featurestore.format.schema import (
    HIDDEN_STATS,
    GroupFeatures,
    GroupSpec,
    HiddenFeatures,
    HiddenSpec,
    LogitsFeatures,
    LogitsSpec,
    LseFeatures,
    LseSpec,
)
from featurestore.format.states.rotated import ROTATED
from pipeline.capture.reduce import LogitRows, encode_hidden, lse_at, reduce_logits
from pipeline.capture.spec import CaptureSpec, captured_as
from pipeline.capture.tiles import run_tiles

TILE_ELEMENTS = 2**20


@dataclass(frozen=True)
class Field:
    name: str
    dtype: np.dtype[np.generic]
    width: int  # elements per position
    start: int  # byte offset in the row


@dataclass(frozen=True)
class RowLayout:
    """Where each field of a position lies in its row of `size` bytes; hidden_size: D of the teacher."""

    fields: tuple[Field, ...]
    size: int
    hidden_size: int

    @classmethod
    def of(cls, spec: CaptureSpec, hidden_size: int) -> RowLayout:
        columns: list[tuple[str, np.dtype[np.generic], int]] = []
        if spec.top_k:
            columns += [("counts", np.dtype(np.int32), 1), ("head_ids", np.dtype(np.int32), spec.top_k)]
            columns += [("head_logits", np.dtype(np.float32), spec.top_k)]
            columns += [(name, np.dtype(np.float32), 1) for name in ("lse", "label_logprob", "entropy")]
        if spec.tail:
            columns.append(("tail_draws", np.dtype(np.int32), spec.tail))
        columns += [(lse_field(temperature), np.dtype(np.float32), 1) for temperature in spec.temperatures]
        for layer, dtype in zip(spec.layers, spec.hidden_dtypes, strict=True):
            stored, scaled = HIDDEN_DTYPES[dtype]
            columns.append((f"hidden.{layer}", np.dtype(stored), hidden_width(dtype, hidden_size)))
            if scaled:
                columns.append((f"scale.{layer}", np.dtype(np.float32), 1))
            columns += [(f"{name}.{layer}", np.dtype(np.float32), 1) for name in HIDDEN_STATS]
        fields, start = [], 0
        for name, numpy_dtype, width in columns:
            fields.append(Field(name, numpy_dtype, width, start))
            start += numpy_dtype.itemsize * width
        return cls(tuple(fields), start, hidden_size)

    def pack(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """uint8 [N, size] on the device of the tensors, each [N] or [N, width]."""
        parts = []
        for field in self.fields:
            tensor = tensors[field.name]
            rows = tensor.reshape(tensor.shape[0], field.width).contiguous()
            parts.append(rows.view(torch.uint8))
        return torch.cat(parts, dim=-1)

    def unpack(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The fields of uint8 [T, size] as arrays [T] (width 1) or [T, width] that look into the rows."""
        out = {}
        for field in self.fields:
            stop = field.start + field.dtype.itemsize * field.width
            flat = rows[:, field.start : stop].view(field.dtype)
            out[field.name] = flat[:, 0] if field.width == 1 else flat
        return out


class PackedFeatures(Mapping[GroupSpec, GroupFeatures]):
    """The features of one sample in its rows, uint8 [T, C]; they are unpacked where they are first read."""

    def __init__(self, rows: np.ndarray, layout: RowLayout, groups: tuple[GroupSpec, ...]) -> None:
        self._rows, self._layout, self._groups = rows, layout, groups

    def __getitem__(self, group: GroupSpec) -> GroupFeatures:
        return self._features[group]

    def __iter__(self) -> Iterator[GroupSpec]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)

    @cached_property
    def _features(self) -> dict[GroupSpec, GroupFeatures]:
        return to_features(self._layout.unpack(self._rows), self._groups, self._layout.hidden_size)


def distribution_fields(
    spec: CaptureSpec, logits_NV: torch.Tensor, labels_N: torch.Tensor, shifts_N: torch.Tensor
) -> dict[str, torch.Tensor]:
    """All that a capture keeps of the logits of N rows, by field name (see `reduce_logits`)."""
    if logits_NV.is_cuda:
        reduce_rows = fused_fields if has_kernel(logits_NV.device) else _tile_fields
        return reduce_rows(spec, logits_NV, labels_N, shifts_N)
    # The passes over a few rows stay in the cache of the core that makes all of them.
    rows, vocab = logits_NV.shape
    step = max(1, TILE_ELEMENTS // vocab)

    def tile(start: int) -> dict[str, torch.Tensor]:
        part = slice(start, start + step)
        return _tile_fields(spec, logits_NV[part], labels_N[part], shifts_N[part])

    tiles = run_tiles(tile, range(0, rows, step))
    return {name: torch.cat([tile[name] for tile in tiles]) for name in tiles[0]}


@cache
def has_kernel(device: torch.device) -> bool:
    """Whether the Triton kernel runs there; a CUDA build of torch brings Triton along, but need not."""
    if find_spec("triton") is None:
        return False
    from pipeline.capture.reduce_triton import agrees

    return agrees(device)


def _tile_fields(
    spec: CaptureSpec, logits_NV: torch.Tensor, labels_N: torch.Tensor, shifts_N: torch.Tensor
) -> dict[str, torch.Tensor]:
    logits_NV = logits_NV.float()
    names = [lse_field(temperature) for temperature in spec.temperatures]
    fields = dict(zip(names, lse_at(logits_NV, spec.temperatures), strict=True)) if names else {}
    if spec.top_k:
        rows = reduce_logits(
            logits_NV=logits_NV,
            labels_N=labels_N,
            top_k=spec.top_k,
            top_p=spec.top_p,
            tail=spec.tail,
            shifts_N=shifts_N,
        )
        fields |= logit_fields(rows)
    return fields


def fused_fields(
    spec: CaptureSpec, logits_NV: torch.Tensor, labels_N: torch.Tensor, shifts_N: torch.Tensor
) -> dict[str, torch.Tensor]:
    """`distribution_fields` by the Triton kernel, which reads logits of any float type only once."""
    from pipeline.capture.reduce_triton import reduce_scanned, scan

    found = scan(logits_NV, labels_N, spec.temperatures)
    fields = {lse_field(temperature): found.lse(temperature) for temperature in spec.temperatures}
    if spec.top_k:
        rows = reduce_scanned(
            logits_NV=logits_NV,
            labels_N=labels_N,
            found=found,
            top_k=spec.top_k,
            top_p=spec.top_p,
            tail=spec.tail,
            shifts_N=shifts_N,
        )
        fields |= logit_fields(rows)
    return fields


def logit_fields(rows: LogitRows) -> dict[str, torch.Tensor]:
    """The reduced logits by field name."""
    tensors = {field.name: getattr(rows, field.name) for field in dataclasses.fields(rows)}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def lse_field(temperature: float) -> str:
    """The name of the field that holds the logsumexp at a temperature."""
    return LseSpec(temperature).kind


def hidden_fields(layer: int, stream_ND: torch.Tensor, dtype: str) -> dict[str, torch.Tensor]:
    """The encoded hidden states of one layer, by field name."""
    rows = encode_hidden(stream_ND, dtype)
    fields = {f"{name}.{layer}": getattr(rows, name) for name in HIDDEN_STATS}
    fields[f"hidden.{layer}"] = rows.values
    return fields if rows.scale is None else fields | {f"scale.{layer}": rows.scale}


def to_features(
    fields: dict[str, np.ndarray], groups: tuple[GroupSpec, ...], hidden_size: int | None = None
) -> dict[GroupSpec, GroupFeatures]:
    """The unpacked fields of one sample as the store's features, ragged heads in CSR form, and states that
    need a basis as float32.

    hidden_size: D of the teacher, for hidden states.
    """
    out: dict[GroupSpec, GroupFeatures] = {}
    for group in groups:
        if isinstance(group, LogitsSpec):
            head_ids = fields["head_ids"].reshape(-1, group.top_k)
            head_logits = fields["head_logits"].reshape(-1, group.top_k)
            keep = np.arange(group.top_k)[None, :] < fields["counts"][:, None]
            out[group] = LogitsFeatures(
                counts=fields["counts"].astype(np.uint16),
                ids=head_ids[keep].astype(np.uint32),
                logits=head_logits[keep],
                lse=fields["lse"],
                label_logprob=fields["label_logprob"],
                entropy=fields["entropy"],
                tail_ids=fields["tail_draws"].reshape(-1, group.tail) if group.tail else None,
            )
        elif isinstance(group, LseSpec):
            out[group] = LseFeatures(fields[lse_field(group.temperature)])
        elif isinstance(group, HiddenSpec):
            values = fields[f"hidden.{group.layer}"]
            out[group] = HiddenFeatures(
                values=values.reshape(len(values), -1),
                scale=fields.get(f"scale.{group.layer}"),
                dtype=captured_as(group.dtype),
                hidden_size=hidden_size if group.dtype in ROTATED else None,
                squared_error=fields[f"squared_error.{group.layer}"],
                squared_norm=fields[f"squared_norm.{group.layer}"],
            )
    return out
