"""What a planned `generate` would cost, before anything is spent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from featurestore.format.kinds.table import kind_of
from featurestore.format.plan import Work
from featurestore.format.schema import GroupSpec
from featurestore.store import FeatureStore
from pipeline.data.samples import LeftOut
from pipeline.generate.pace import Pace, earlier_pace, matrix_product_rates, rough_pace
from pipeline.generate.run import PreparedCapture
from pipeline.teacher.checkpoint import count_parameters


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Sizes of the work that is left, and about how long it takes.

    bytes_to_write is an upper bound where heads are adaptive, unless bytes_measured: then it is from what the
    same column groups take in this store. sidecar_bytes: of the teacher's weights, part of bytes_to_write.
    seconds: of capture, without the engine's start. seconds_from: in words, where that number comes from.
    sampled: whether the numbers follow from the first portion of the data set and the share of it that this
    portion is. False where they are exact; where the size of the data set is not known either, they are those
    of the first portion, and `at_least` is set, too.
    texts, texts_to_write: of --continuations; one that is to be written counts with its greatest length, and
    the time to write it does not count.
    """

    samples: int
    left_out: LeftOut
    tokens: int
    tokens_to_do: int
    shards_to_do: int
    groups_to_do: tuple[str, ...]
    bytes_to_write: int
    bytes_measured: bool
    sidecar_bytes: int
    seconds: float
    seconds_from: str
    sampled: bool = False
    at_least: bool = False
    texts: int = 0
    texts_to_write: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def estimate(prepared: PreparedCapture) -> Forecast:
    """Sum the rows that each missing column group needs; time them by the store's pace or the machine's."""
    plan, store = prepared.first.plan, prepared.store
    stored = stored_row_bytes(store) if store else {}
    kinds = {group.kind for work in plan.work for group in work.groups}
    pace = _pace(prepared) if plan.work else None
    sidecar = sum(part.size for part in prepared.sidecar)

    def whole(count: float) -> int:
        """Of what the first portion has, what there is in the whole data set."""
        return prepared.estimated(round(count)) or round(count)

    to_do = whole(plan.rows_to_do)
    return Forecast(
        samples=whole(plan.samples_total),
        left_out=prepared.left_out,
        tokens=whole(plan.rows_total),
        tokens_to_do=to_do,
        shards_to_do=whole(len(plan.work)),
        groups_to_do=tuple(sorted(kinds)),
        bytes_to_write=whole(bytes_of(plan.work, stored, prepared.teacher.hidden_size)) + sidecar,
        bytes_measured=all(group in stored for work in plan.work for group in work.groups),
        sidecar_bytes=sidecar,
        seconds=round(pace.seconds(to_do), 3) if pace else 0.0,
        seconds_from=pace.source if pace else "nothing to do",
        sampled=not prepared.complete,
        at_least=prepared.estimated(0) is None,
        texts=len(prepared.writing.jobs) if prepared.writing else 0,
        texts_to_write=prepared.writing.missing if prepared.writing else 0,
    )


def bytes_of(work: Iterable[Work], stored: Mapping[GroupSpec, float], hidden_size: int) -> float:
    """Bytes of the column groups that are left, at the bytes per row of `stored` for those it knows."""
    size = 0.0
    for one in work:
        for group in one.groups:
            size += one.task.rows * stored.get(group, kind_of(group).row_bytes(group, hidden_size))
    return size


def stored_row_bytes(store: FeatureStore) -> dict[GroupSpec, float]:
    """Bytes per row that each committed column group takes."""
    inventory = store.inventory()
    totals = inventory.totals
    return {spec: totals[group].size / totals[group].rows for group, spec in inventory.specs.items()}


def _pace(prepared: PreparedCapture) -> Pace:
    request, store = prepared.request, prepared.store
    earlier = earlier_pace([*store.provenance(), *store.unrecorded_runs()], request.engine) if store else None
    if earlier is not None:
        return earlier
    rate = matrix_product_rates()[request.torch_dtype(prepared.teacher)]
    return rough_pace(rate, count_parameters(prepared.teacher))
