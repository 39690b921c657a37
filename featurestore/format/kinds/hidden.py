"""Hidden states of one layer: a vector of each position, for some dtypes with a scale.

R rows (positions of all samples of a task), D hidden size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from featurestore.errors import CorruptionError, StoreFormatError
from featurestore.format.arrays import ChunkCache, ShardArray
from featurestore.format.codec import HIDDEN_DTYPES, hidden_width
from featurestore.format.columns import ArrayLayout, Extent, Stats, compressed
from featurestore.format.int4 import MAX_SIZE, outlier_columns
from featurestore.format.kinds.arrow import NUMBERS, column_name, lists
from featurestore.format.kinds.base import Array, GroupKind, ReadSample
from featurestore.format.schema import HIDDEN_STATS, HiddenFeatures, HiddenSpec, TeacherIdentity

_ROWS_PER_CHUNK = 256
_LOGICAL_DTYPES = {
    "bf16": "bfloat16",
    "int8": "int8",
    "fp8": "float8_e4m3fn",
    "int4": "int4 rows",
    "f32": "float32",
}
_BY_PRECISION = ("int4", "fp8", "int8", "bf16", "f32")


class HiddenKind(GroupKind[HiddenSpec, HiddenFeatures, HiddenFeatures]):
    """The arrays `values` [R, D] (int4: [R, W]), uncompressed, and with int8 and fp8 `scale`, float32 [R]."""

    name = "hidden"
    ids = r"hidden\.L(0|[1-9][0-9]{0,3})"
    spec = HiddenSpec
    stats = HIDDEN_STATS
    # Groups of before, and those whose capture could not measure its error, have none.
    stats_optional = True

    def width(self, spec: HiddenSpec) -> tuple[float, ...]:
        return (_BY_PRECISION.index(spec.dtype),)

    def flag(self, kind: str) -> str | None:
        found = re.fullmatch(r"hidden\.L([0-9]+)", kind)
        return f"--hidden-layers {found[1]}" if found else None

    def check_teacher(self, spec: HiddenSpec, identity: TeacherIdentity) -> None:
        if spec.layer > identity.num_layers:
            raise ValueError(f"the teacher has {identity.num_layers} layers, no layer {spec.layer}")
        if spec.dtype == "int4" and identity.hidden_size > MAX_SIZE:
            raise ValueError(
                f"int4 is for states of at most {MAX_SIZE:,} numbers, not {identity.hidden_size:,}"
            )

    def check(self, spec: HiddenSpec, one: Any, length: int, identity: TeacherIdentity) -> None:
        if not isinstance(one, HiddenFeatures) or one.dtype != spec.dtype:
            raise ValueError(f"expected HiddenFeatures of dtype {spec.dtype}")
        one.check(length, identity.hidden_size)

    def layouts(self, spec: HiddenSpec, extent: Extent) -> dict[str, ArrayLayout]:
        stored, scaled = HIDDEN_DTYPES[spec.dtype]
        values = ArrayLayout(
            shape=(extent.rows, hidden_width(spec.dtype, extent.hidden_size)),
            dtype=np.dtype(stored),
            chunk_rows=_ROWS_PER_CHUNK,
            compressed=False,
            attributes={"logical_dtype": _LOGICAL_DTYPES[spec.dtype]},
        )
        scale = {"scale": compressed((extent.rows,), np.float32)} if scaled else {}
        return {"values": values, **scale}

    def pack(
        self, spec: HiddenSpec, features: Sequence[HiddenFeatures], identity: TeacherIdentity
    ) -> tuple[dict[str, Array], Stats]:
        arrays = {"values": np.concatenate([one.values for one in features])}
        scales = [one.scale for one in features if one.scale is not None]
        if scales:
            arrays["scale"] = np.concatenate(scales)
        return arrays, _stats(features)

    def check_stats(self, spec: HiddenSpec, stats: Stats, rows: int, where: str) -> None:
        if min(stats.values()) < 0:
            raise StoreFormatError(f"{where}: a sum of squares is negative")

    def open(
        self, spec: HiddenSpec, directory: Path, extent: Extent, cache: ChunkCache | None
    ) -> ReadSample[HiddenFeatures]:
        shapes = self.layouts(spec, extent)
        arrays = {name: ShardArray(directory / name, layout, cache) for name, layout in shapes.items()}
        values, scale = arrays["values"], arrays.get("scale")
        size = extent.hidden_size if spec.dtype == "int4" else None

        def read(_: int, start: int, stop: int) -> HiddenFeatures:
            scales = None if scale is None else scale.read(start, stop)
            rows = values.read(start, stop)
            if size is not None and (outlier_columns(rows, size) >= size).any():
                raise CorruptionError(f"{values.path}: an outlier beyond the hidden size {size:,}")
            return HiddenFeatures(rows, scales, spec.dtype, hidden_size=size)

        return read

    def decode(self, codes: HiddenFeatures) -> HiddenFeatures:
        return codes

    def measures(self, spec: HiddenSpec, stats: Stats, rows: int) -> dict[str, float | None]:
        norm = stats.get("squared_norm", 0.0)
        return {"relative_error": math.sqrt(stats["squared_error"] / norm) if norm else None}

    def row_bytes(self, spec: HiddenSpec, hidden_size: int) -> float:
        stored, scaled = HIDDEN_DTYPES[spec.dtype]
        return hidden_width(spec.dtype, hidden_size) * np.dtype(stored).itemsize + (4 if scaled else 0)

    def export_row_bytes(self, spec: HiddenSpec, hidden_size: int) -> int:
        return 4 * hidden_size

    def export_fields(self, spec: HiddenSpec) -> list[tuple[str, Any]]:
        return [(column_name(spec.kind), pa.list_(NUMBERS))]

    def export_columns(self, spec: HiddenSpec, features: Sequence[HiddenFeatures]) -> dict[str, Any]:
        values = np.concatenate([one.to_float32() for one in features])
        rows = lists(np.full(len(values), values.shape[1]), pa.array(values.ravel()))
        return {column_name(spec.kind): rows}


def _stats(features: Sequence[HiddenFeatures]) -> Stats:
    """HIDDEN_STATS over all rows; empty unless every sample has them and all are finite."""
    sums: Stats = {}
    for name in HIDDEN_STATS:
        rows = [getattr(one, name) for one in features]
        if any(row is None for row in rows):
            return {}
        sums[name] = float(np.concatenate(rows).sum(dtype=np.float64))
    return sums if all(map(math.isfinite, sums.values())) else {}
