"""--select and --weight on given caches: the distributions that their measures are read from, the bounds of
quantiles, and what share of the positions is left.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from featurestore.errors import MissingFeatureError
from featurestore.format.codec import ROW_STEPS
from featurestore.format.codes import LogitsCodes
from featurestore.format.schema import LogitsSpec
from featurestore.reader import CacheReader, CodedSample
from student.data.batches import codes_of
from student.data.measures import RANDOM, Array, Condition, Curriculum, measure
from student.data.stores import CacheStores
from student.errors import UserError

SAMPLES = 256  # that are looked at to say what share of the positions is left
_MOST = 2**20  # codes of a measure; more nats than any vocabulary allows

Positions = tuple[CodedSample, list[LogitsCodes | None]]  # a sample, and its codes of each cache


def plan_curriculum(asked: Curriculum, stores: CacheStores, training: Sequence[int]) -> Curriculum | None:
    """What --select and --weight ask for, on these caches; None where neither is given.

    Bounds that are quantiles cost a pass over the training set; those in nats, and random shares, none.

    training: the samples that are trained on, in the numbers of the first cache.

    Raises:
        UserError: a cache does not know a measure, or nothing is left to learn.
    """
    if not asked.measures:
        return None
    asked = replace(asked, specs=_specs(asked, stores))
    quantiles = [one.measure for one in asked.conditions if math.isnan(one.bound)]
    if quantiles:
        counts = _histograms(quantiles, _read(stores, asked.specs, training))
        bounded = (
            _bounded(one, counts[one.measure]) if one.measure in counts else one for one in asked.conditions
        )
        asked = replace(asked, conditions=tuple(bounded))
    return replace(asked, said=_say(asked, stores, training))


def _flags(curriculum: Curriculum, measured: str | None = None) -> str:
    """How the flags were given; measured: only those that read this measure."""
    selects = [str(one) for one in curriculum.conditions if measured in (None, one.measure)]
    words = [f"--select {','.join(selects)!r}"] if selects else []
    if curriculum.weight and measured in (None, curriculum.weight):
        words.append(f"--weight {curriculum.weight}")
    return " ".join(words)


def _specs(asked: Curriculum, stores: CacheStores) -> tuple[LogitsSpec | None, ...]:
    """The distribution of each cache that a measure is read from."""
    if "disagreement" in asked.measures and len(stores) == 1:
        raise UserError(
            f"{_flags(asked, 'disagreement')}: one teacher agrees with itself; give two STOREs or more, or "
            "choose entropy or surprise"
        )
    specs: list[LogitsSpec | None] = []
    known = [one for one in asked.measures if one != RANDOM]
    for store, reader in enumerate(stores.readers):
        measures = known if store == 0 else [one for one in known if one == "disagreement"]
        specs.append(_spec(asked, measures, reader, stores.names[store]) if measures else None)
    return tuple(specs)


def _spec(asked: Curriculum, measures: Iterable[str], reader: CacheReader, name: str) -> LogitsSpec:
    try:
        spec = reader.find("logits")
    except MissingFeatureError as error:
        raise UserError(
            f"{_flags(asked)}: {name} holds no distributions for all samples; add them with "
            "`distily-cache generate ... --top-k 12`"
        ) from error
    assert isinstance(spec, LogitsSpec)
    if "entropy" in measures and spec.partial:
        raise UserError(
            f"{_flags(asked, 'entropy')}: {name} was imported and does not know the teacher's entropy; make "
            "a cache with `distily-cache generate`, or choose surprise"
        )
    return spec


def _read(
    stores: CacheStores, specs: Sequence[LogitsSpec | None], indices: Iterable[int]
) -> Iterator[Positions]:
    for index in indices:
        samples = [
            reader.read_codes(stores.index(store, index), [] if spec is None else [spec])
            for store, (reader, spec) in enumerate(zip(stores.readers, specs, strict=True))
        ]
        yield samples[0], [codes_of(sample, spec) for sample, spec in zip(samples, specs, strict=True)]


def _histograms(measures: Sequence[str], positions: Iterable[Positions]) -> dict[str, Array]:
    """For each measure, how many learned positions have 0, 1, 2, ... steps of 1/64 nat; int64."""
    counts = {name: np.zeros(1, np.int64) for name in measures}
    for sample, codes in positions:
        for name, before in counts.items():
            values = measure(name, sample, codes)[:-1][sample.loss_mask[1:]]
            steps = np.rint(values[np.isfinite(values)] * ROW_STEPS).clip(0, _MOST).astype(np.int64)
            counts[name] = np.bincount(steps, minlength=len(before))
            counts[name][: len(before)] += before
    return counts


def _bounded(condition: Condition, counts: Array) -> Condition:
    """With the bound of a quantile: the smallest value that its share of the positions does not exceed."""
    total = int(counts.sum())
    if condition.percent is None or not total:  # nothing is known, which is refused as nothing left
        return condition
    steps = int(np.searchsorted(np.cumsum(counts), condition.percent / 100 * total))
    return replace(condition, bound=steps / ROW_STEPS)


def _say(asked: Curriculum, stores: CacheStores, training: Sequence[int]) -> str:
    """What share of the positions is left; UserError where it is none."""
    looked_at = stores.first.catalogue.smallest(SAMPLES, training)
    before = after = unknown = 0
    weights = 0.0
    for sample, codes in _read(stores, asked.specs, looked_at):
        learned, weight_T = asked.apply(sample, codes)
        known_T = np.all([np.isfinite(measure(name, sample, codes)) for name in asked.measures], axis=0)
        before += int(sample.loss_mask[1:].sum())
        unknown += int((sample.loss_mask[1:] & ~known_T[:-1]).sum())
        after += int(learned.sum())
        if weight_T is not None:
            weights += float(weight_T[:-1][learned[1:]].sum(dtype=np.float64))
    number = "the" if len(looked_at) == len(training) else f"{len(looked_at)} of the"
    seen = f"{before:,} positions of {number} {len(training):,} training samples"
    if not after:
        fix = "leave the flag out" if unknown == before else "choose a wider bound"
        what = f"are not known at any of {seen}" if unknown == before else f"leave nothing to learn of {seen}"
        raise UserError(f"{_flags(asked)}: the measures {what}; {fix}")
    if asked.weight and not weights:
        raise UserError(
            f"{_flags(asked, asked.weight)}: the {asked.weight} is 0 at all that are learned of {seen}; "
            "leave --weight out, or choose another measure"
        )
    parts = [f"{after / before:.1%} of {seen} are learned"]
    parts += [
        f"{one.percent:g}% of the positions have a {one.measure} of at most {one.bound:.4g} nats"
        for one in asked.conditions
        if one.percent is not None and one.measure != RANDOM
    ]
    parts += [f"their mean {asked.weight} is {weights / after:.4g} nats"] if asked.weight else []
    parts += [f"{unknown / before:.1%} are left out since it is not known of them"] if unknown else []
    return f"{_flags(asked)}: {'; '.join(parts)}"
