"""Logsumexps at a temperature: one number of each position."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from featurestore.format.arrays import ChunkCache, ShardArray
from featurestore.format.codec import LSE_STEPS, decode_rows, encode_rows
from featurestore.format.columns import ArrayLayout, Extent, Stats, compressed
from featurestore.format.kinds.arrow import NUMBERS, column_name
from featurestore.format.kinds.base import Array, GroupKind, ReadSample
from featurestore.format.schema import LseFeatures, LseSpec, TeacherIdentity
from featurestore.format.states.transform import Basis

# Measured on 5,236 positions of the demo: 2.1 at T=0.5, 1.7 at T=4.
_ROW_BYTES = 2.0


class LseKind(GroupKind[LseSpec, LseFeatures, LseFeatures]):
    """The array `lse`, int32 [R] in steps of 1/256 nat."""

    name = "lse"
    ids = r"lse\.T(0|[1-9][0-9]{0,2})(\.[0-9]{0,2}[1-9])?"
    spec = LseSpec

    def flag(self, kind: str) -> str | None:
        found = re.fullmatch(r"lse\.T([0-9.]+)", kind)
        return f"--temperatures {found[1]}" if found else None

    def check(self, spec: LseSpec, one: Any, length: int, identity: TeacherIdentity) -> None:
        if not isinstance(one, LseFeatures):
            raise ValueError(f"expected LseFeatures, not {type(one).__name__}")
        one.check(length)

    def layouts(self, spec: LseSpec, extent: Extent) -> dict[str, ArrayLayout]:
        return {"lse": compressed((extent.rows,), np.int32, attributes={"steps_per_nat": LSE_STEPS})}

    def pack(
        self, spec: LseSpec, features: Sequence[LseFeatures], identity: TeacherIdentity
    ) -> tuple[dict[str, Array], Stats]:
        lse = np.concatenate([one.lse for one in features])
        return {"lse": encode_rows(lse, np.int32, LSE_STEPS)}, {}

    def open(
        self,
        spec: LseSpec,
        directory: Path,
        extent: Extent,
        cache: ChunkCache | None,
        basis: Basis | None = None,
    ) -> ReadSample[LseFeatures]:
        lse = ShardArray(directory / "lse", self.layouts(spec, extent)["lse"], cache)
        return lambda _, start, stop: LseFeatures(decode_rows(lse.read(start, stop), LSE_STEPS))

    def decode(self, codes: LseFeatures) -> LseFeatures:
        return codes

    def row_bytes(self, spec: LseSpec, hidden_size: int) -> float:
        return _ROW_BYTES

    def export_row_bytes(self, spec: LseSpec, hidden_size: int) -> int:
        return 4

    def export_fields(self, spec: LseSpec) -> list[tuple[str, Any]]:
        return [(column_name(spec.kind), NUMBERS)]

    def export_columns(
        self, spec: LseSpec, features: Sequence[LseFeatures], lengths: Sequence[int]
    ) -> dict[str, Any]:
        return {column_name(spec.kind): pa.array(np.concatenate([one.lse for one in features]))}
