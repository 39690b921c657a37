"""Hidden states of one layer: a vector of each position, or of a share of them, for some dtypes with a scale.

R rows (positions of all samples of a task), S samples, D hidden size, W bytes of a row of int4, int2, klt4
or klt6.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from featurestore.errors import CorruptionError, StoreFormatError
from featurestore.format.arrays import ChunkCache, ShardArray
from featurestore.format.codec import HIDDEN_DTYPES, hidden_width, row_starts
from featurestore.format.columns import ArrayLayout, Extent, Stats, compressed
from featurestore.format.kinds.arrow import NUMBERS, column_name, lists
from featurestore.format.kinds.base import Array, GroupKind, ReadSample
from featurestore.format.positions import kept_positions
from featurestore.format.schema import (
    HIDDEN_STATS,
    HiddenFeatures,
    HiddenSpec,
    Sample,
    TeacherIdentity,
    are_positions,
)
from featurestore.format.states.rotated import MAX_SIZE, ROTATED, outlier_columns
from featurestore.format.states.transform import (
    MAX_TRANSFORMED,
    MIN_SIZE,
    TRANSFORMED,
    Basis,
    basis_file,
)
from featurestore.identity import check_int

_ROWS_PER_CHUNK = 256
_DIGEST_BYTES = 16
_LOGICAL_DTYPES = {
    "bf16": "bfloat16",
    "int8": "int8",
    "fp8": "float8_e4m3fn",
    "int4": "int4 rows",
    "int2": "int2 rows",
    "klt4": "klt4 rows",
    "klt6": "klt6 rows",
    "f32": "float32",
}
_BY_PRECISION = ("int2", "int4", "klt4", "fp8", "int8", "klt6", "bf16", "f32")
# Of a position in a share: its number, compressed (measured in tests/featurestore/test_positions.py).
_NUMBER_BYTES = 1


class HiddenKind(GroupKind[HiddenSpec, HiddenFeatures, HiddenFeatures]):
    """The arrays `values` [R, D] (rows of bytes: [R, W]), uncompressed, with int8 and fp8 `scale`, float32
    [R], and with klt4 and klt6 `basis`, uint8 [16], the digest of their basis.

    Of a share of the positions these have a row for each that is kept, or one row of zeros where none is;
    `positions` says where in their samples they are, int32 [rows], and `sample_offsets` where the rows of
    each sample begin, int64 [S + 1].
    """

    name = "hidden"
    ids = r"hidden\.L(0|[1-9][0-9]{0,3})"
    spec = HiddenSpec
    stats = HIDDEN_STATS

    def stat_names(self, spec: HiddenSpec) -> list[str]:
        return [*HIDDEN_STATS] if spec.whole else ["entries", *HIDDEN_STATS]

    def least_stats(self, spec: HiddenSpec) -> int:
        """Groups of before, and those whose capture could not measure its error, have no HIDDEN_STATS."""
        return 0 if spec.whole else 1

    def covers(self, have: HiddenSpec, want: HiddenSpec) -> bool:
        if (have.layer, have.dtype) != (want.layer, want.dtype):
            return False
        if have.whole or want.whole:
            return have.whole
        return have.seed == want.seed and have.above <= want.above and want.positions <= have.positions

    def parts(self, have: Sequence[HiddenSpec], want: HiddenSpec) -> list[HiddenSpec]:
        if any(self.covers(one, want) for one in have):
            return [want]
        found = _longest(have, want)
        return found if found and found[-1].positions == want.positions else []

    def rest(self, have: Sequence[HiddenSpec], want: HiddenSpec) -> HiddenSpec | None:
        """Of a share the positions that a smaller one in `have` lacks."""
        if self.parts(have, want):
            return None
        found = _longest(have, want)
        return replace(want, seed=found[-1].seed, above=found[-1].positions) if found else want

    def ways(self, have: Sequence[HiddenSpec], want: HiddenSpec) -> list[list[HiddenSpec]]:
        """Cut wherever a group begins or ends; all positions, by any seed."""
        ways = [[want]]
        for seed in _seeds(have, want):
            ends = {end for one in have if one.seed == seed for end in (one.above, one.positions)}
            cuts = [want.above, *sorted(end for end in ends if want.above < end < want.positions)]
            if len(cuts) > 1:
                ends_of = [*cuts[1:], want.positions]
                ways.append(
                    [
                        replace(want, positions=b, seed=seed, above=a)
                        for a, b in zip(cuts, ends_of, strict=True)
                    ]
                )
        return ways

    def offered(self, spec: HiddenSpec) -> HiddenSpec:
        return replace(spec, above=0.0, seed=0 if spec.positions == 1 else spec.seed)

    def width(self, spec: HiddenSpec) -> tuple[float, ...]:
        return spec.share, _BY_PRECISION.index(spec.dtype)

    def flag(self, kind: str) -> str | None:
        found = re.fullmatch(r"hidden\.L([0-9]+)", kind)
        return f"--hidden-layers {found[1]}" if found else None

    def keep(self, spec: HiddenSpec, features: HiddenFeatures, sample: Sample) -> HiddenFeatures:
        return features if spec.whole else features.at(_kept(spec, sample))

    def check_teacher(self, spec: HiddenSpec, identity: TeacherIdentity) -> None:
        if spec.layer > identity.num_layers:
            raise ValueError(f"the teacher has {identity.num_layers} layers, no layer {spec.layer}")
        if spec.dtype in ROTATED and identity.hidden_size > MAX_SIZE:
            raise ValueError(
                f"{spec.dtype} is for states of at most {MAX_SIZE:,} numbers, not {identity.hidden_size:,}"
            )
        if spec.dtype in TRANSFORMED and (spec.layer != identity.num_layers or not spec.whole):
            raise ValueError(f"{spec.dtype} is for the state that enters the LM head, at all positions")
        if spec.dtype in TRANSFORMED and not MIN_SIZE <= identity.hidden_size <= MAX_TRANSFORMED:
            raise ValueError(f"{spec.dtype} is for states of {MIN_SIZE} to {MAX_TRANSFORMED:,} numbers")

    def check(self, spec: HiddenSpec, one: Any, length: int, identity: TeacherIdentity) -> None:
        if not isinstance(one, HiddenFeatures) or one.dtype != spec.dtype:
            raise ValueError(f"expected HiddenFeatures of dtype {spec.dtype}")
        if spec.whole != (one.positions is None):
            raise ValueError("positions are needed for a share of them, and for nothing else")
        one.check(length, identity.hidden_size)

    def layouts(self, spec: HiddenSpec, extent: Extent) -> dict[str, ArrayLayout]:
        stored, scaled = HIDDEN_DTYPES[spec.dtype]
        rows = extent.rows if spec.whole else max(1, extent.entries)
        values = ArrayLayout(
            shape=(rows, hidden_width(spec.dtype, extent.hidden_size)),
            dtype=np.dtype(stored),
            chunk_rows=_ROWS_PER_CHUNK,
            compressed=False,
            attributes={"logical_dtype": _LOGICAL_DTYPES[spec.dtype]},
        )
        arrays = {"values": values}
        if scaled:
            arrays["scale"] = compressed((rows,), np.float32)
        if spec.dtype in TRANSFORMED:
            arrays["basis"] = compressed((_DIGEST_BYTES,), np.uint8)
        if not spec.whole:
            arrays["positions"] = compressed((rows,), np.int32)
            arrays["sample_offsets"] = compressed((extent.samples + 1,), np.int64)
        return arrays

    def pack(
        self, spec: HiddenSpec, features: Sequence[HiddenFeatures], identity: TeacherIdentity
    ) -> tuple[dict[str, Array], Stats]:
        names = ("values", "scale", "positions")
        parts = {name: [getattr(one, name) for one in features] for name in names}
        arrays = {name: np.concatenate(part) for name, part in parts.items() if part[0] is not None}
        bases = {one.basis.digest for one in features if one.basis is not None}
        if len(bases) > 1:
            raise ValueError("the samples of a task need one basis")
        if bases:
            arrays["basis"] = np.frombuffer(bytes.fromhex(bases.pop()), np.uint8)
        if spec.whole:
            return arrays, _stats(features)
        offsets = row_starts(np.array([len(one.values) for one in features]))
        if not offsets[-1]:
            arrays = {name: np.zeros((1, *array.shape[1:]), array.dtype) for name, array in arrays.items()}
        entries: Stats = {"entries": int(offsets[-1])}
        return arrays | {"sample_offsets": offsets}, entries | _stats(features)

    def check_stats(self, spec: HiddenSpec, stats: Stats, rows: int, where: str) -> None:
        if not spec.whole:
            check_int(stats["entries"], 0, rows, f"{where}: entries")
        if min(stats.values()) < 0:
            raise StoreFormatError(f"{where}: a sum of squares is negative")

    def basis(self, spec: HiddenSpec) -> str | None:
        """klt4 and klt6 have one."""
        return spec.dtype if spec.dtype in TRANSFORMED else None

    def open(
        self,
        spec: HiddenSpec,
        directory: Path,
        extent: Extent,
        cache: ChunkCache | None,
        basis: Basis | None = None,
    ) -> ReadSample[HiddenFeatures]:
        shapes = self.layouts(spec, extent)
        arrays = {name: ShardArray(directory / name, layout, cache) for name, layout in shapes.items()}
        size = extent.hidden_size if spec.dtype in ROTATED else None
        if spec.dtype in TRANSFORMED:
            assert basis is not None
            found = arrays.pop("basis").read(0, _DIGEST_BYTES).tobytes().hex()
            if found != basis.digest:
                raise StoreFormatError(
                    f"{directory}: made in the basis {found}, but the one of the store is {basis.digest}; "
                    f"copy teacher/{basis_file(spec.dtype)} from the store that these files come from"
                )
        if spec.whole:
            opened = _Opened(arrays, spec.dtype, size, basis)
            return lambda _, start, stop: opened.read(start, stop)
        offsets = arrays.pop("sample_offsets").read(0, extent.samples + 1).tolist()
        if offsets[0] or offsets[-1] != extent.entries or offsets != sorted(offsets):
            raise CorruptionError(
                f"{directory / 'sample_offsets'}: these are no offsets of {extent.entries} rows"
            )
        return _OpenedShare(arrays, spec.dtype, size, None, offsets).read_sample

    def decode(self, codes: HiddenFeatures) -> HiddenFeatures:
        return codes

    def cut(
        self,
        codes: HiddenFeatures,
        have: HiddenSpec,
        want: HiddenSpec,
        sample: Sample,
        identity: TeacherIdentity,
    ) -> HiddenFeatures:
        same = (have.above, have.positions) == (want.above, want.positions)
        return codes if same else codes.at(_kept(want, sample))

    def join(self, parts: Sequence[HiddenFeatures], want: HiddenSpec) -> HiddenFeatures:
        if len(parts) == 1:
            return parts[0]
        positions = np.concatenate([one.positions for one in parts if one.positions is not None])
        order = np.argsort(positions)
        arrays = {name: [getattr(one, name) for one in parts] for name in ("values", "scale")}
        joined: dict[str, Any] = {
            name: None if some[0] is None else np.concatenate(some)[order] for name, some in arrays.items()
        }
        return replace(parts[0], positions=None if want.whole else positions[order], **joined)

    def measures(self, spec: HiddenSpec, stats: Stats, rows: int) -> dict[str, float | None]:
        norm = stats.get("squared_norm", 0.0)
        return {
            "relative_error": math.sqrt(stats["squared_error"] / norm) if norm else None,
            "share_of_positions": None if spec.whole else spec.share,
        }

    def row_bytes(self, spec: HiddenSpec, hidden_size: int) -> float:
        stored, scaled = HIDDEN_DTYPES[spec.dtype]
        row = hidden_width(spec.dtype, hidden_size) * np.dtype(stored).itemsize + (4 if scaled else 0)
        return row if spec.whole else spec.share * (row + _NUMBER_BYTES)

    def export_row_bytes(self, spec: HiddenSpec, hidden_size: int) -> int:
        return 4 * hidden_size

    def export_fields(self, spec: HiddenSpec) -> list[tuple[str, Any]]:
        return [(column_name(spec.kind), pa.list_(NUMBERS))]

    def export_columns(
        self, spec: HiddenSpec, features: Sequence[HiddenFeatures], lengths: Sequence[int]
    ) -> dict[str, Any]:
        """A position that is not kept has an empty list."""
        values = np.concatenate([one.to_float32() for one in features])
        starts = row_starts(np.asarray(lengths))
        places = [
            start + one.positions for start, one in zip(starts, features, strict=False) if not spec.whole
        ]
        counts = np.full(starts[-1], values.shape[1] if spec.whole else 0)
        counts[np.concatenate(places, dtype=np.int64) if places else []] = values.shape[1]
        return {column_name(spec.kind): lists(counts, pa.array(values.ravel()))}


@dataclass(frozen=True, eq=False)
class _Opened:
    """The open arrays of a group but for `sample_offsets`; size: D, of int4 and int2."""

    arrays: Mapping[str, ShardArray]
    dtype: str
    size: int | None
    basis: Basis | None

    def read(self, start: int, stop: int) -> HiddenFeatures:
        """Rows [start, stop) of the arrays."""
        found = {name: _rows(array, start, stop) for name, array in self.arrays.items()}
        size = self.size
        if size is not None and (outlier_columns(found["values"], self.dtype, size) >= size).any():
            path = self.arrays["values"].path
            raise CorruptionError(f"{path}: an outlier beyond the hidden size {size:,}")
        return HiddenFeatures(
            values=found["values"],
            scale=found.get("scale"),
            dtype=self.dtype,
            hidden_size=self.size,
            positions=found.get("positions"),
            basis=self.basis,
        )


@dataclass(frozen=True, eq=False)
class _OpenedShare(_Opened):
    """offsets: where the rows of each sample begin, and the end."""

    offsets: Sequence[int]

    def read_sample(self, position: int, start: int, stop: int) -> HiddenFeatures:
        """What is kept of the sample at `position` of the task, which has the positions [start, stop)."""
        found = self.read(self.offsets[position], self.offsets[position + 1])
        assert found.positions is not None
        if not are_positions(found.positions, stop - start):
            raise CorruptionError(f"{self.arrays['positions'].path}: these are no positions of the sample")
        return found


def _rows(array: ShardArray, start: int, stop: int) -> Array:
    """Rows [start, stop), of which there may be none."""
    if start == stop:
        return np.zeros((0, *array.layout.shape[1:]), array.layout.dtype)
    return array.read(start, stop)


def _kept(spec: HiddenSpec, sample: Sample) -> Array:
    return kept_positions(sample.id, len(sample), spec.positions, spec.seed, spec.above)


def _seeds(have: Sequence[HiddenSpec], want: HiddenSpec) -> list[int]:
    """Whose shares may be parts of `want`."""
    return sorted({one.seed for one in have}) if want.whole else [want.seed]


def _longest(have: Sequence[HiddenSpec], want: HiddenSpec) -> list[HiddenSpec]:
    """The parts of `want` from its beginning on, as far as shares in `have` reach; of the seed that reaches
    furthest.
    """
    same = [one for one in have if (one.layer, one.dtype) == (want.layer, want.dtype) and not one.whole]
    best: list[HiddenSpec] = []
    for seed in _seeds(same, want):
        parts: list[HiddenSpec] = []
        reached = want.above
        while reached < want.positions:
            there = (one for one in same if one.seed == seed and one.above <= reached < one.positions)
            end = min(max((one.positions for one in there), default=0.0), want.positions)
            if not end:
                break
            parts.append(replace(want, positions=end, seed=seed, above=reached))
            reached = end
        best = max(best, parts, key=lambda found: found[-1].positions if found else 0.0)
    return best


def _stats(features: Sequence[HiddenFeatures]) -> Stats:
    """HIDDEN_STATS over all rows; empty unless every sample has them and all are finite."""
    sums: Stats = {}
    for name in HIDDEN_STATS:
        rows = [getattr(one, name) for one in features]
        if any(row is None for row in rows):
            return {}
        sums[name] = float(np.concatenate(rows).sum(dtype=np.float64))
    return sums if all(map(math.isfinite, sums.values())) else {}
