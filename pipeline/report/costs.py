"""What more of a store would cost: bytes and seconds of further layers, heads and samples."""

from __future__ import annotations

from dataclasses import dataclass

from featurestore.format.kinds.table import kind_of
from featurestore.format.schema import GroupSpec, HiddenSpec, LogitsSpec
from featurestore.maintenance.info import StoreInfo
from pipeline.generate.pace import Pace

_MORE_SAMPLES = 1_000


@dataclass(frozen=True)
class Cost:
    """seconds: of capture, None where the store has recorded no pace."""

    what: str
    bytes: float
    seconds: float | None


def further(info: StoreInfo, pace: Pace | None) -> list[Cost]:
    """A further hidden layer in each storage type, a wide exact head, and more samples of the same kind.

    Layers and heads are for the tokens that the store has; several of them in one command cost one pass of
    the teacher. Nothing where the store holds no sample.
    """
    if not info.rows:
        return []
    hidden, rows = info.identity.hidden_size, info.rows
    layer = info.identity.num_layers // 2
    wanted: list[tuple[str, GroupSpec]] = [
        ("a further hidden layer, int2", HiddenSpec(layer, "int2")),
        ("a further hidden layer, int4", HiddenSpec(layer, "int4")),
        ("a further hidden layer, int8", HiddenSpec(layer, "int8")),
        ("a further hidden layer, bf16", HiddenSpec(layer, "bf16")),
        ("the top 64 of every row, 16 draws", LogitsSpec(64, tail=16)),
    ]
    seconds = _seconds(pace, rows)
    costs = [Cost(what, rows * kind_of(spec).row_bytes(spec, hidden), seconds) for what, spec in wanted]
    share = _MORE_SAMPLES / info.samples
    more = f"{_MORE_SAMPLES:,} more samples like these"
    return [*costs, Cost(more, share * info.bytes, _seconds(pace, round(share * rows)))]


def _seconds(pace: Pace | None, tokens: int) -> float | None:
    return pace.seconds(tokens) if pace else None
