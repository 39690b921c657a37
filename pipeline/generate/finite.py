"""Whether what a teacher computed are numbers: no cache is made of what overflowed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from featurestore.format.schema import (
    GroupFeatures,
    GroupSpec,
    HiddenFeatures,
    HiddenSpec,
    Sample,
    TeacherIdentity,
)
from pipeline.errors import EngineError


def check_finite(
    group: GroupSpec,
    features: Sequence[GroupFeatures],
    samples: Sequence[Sample],
    identity: TeacherIdentity,
) -> None:
    """EngineError that names the first position at which logits or states, or a state's square, are infinite
    or NaN. features: as an engine captured them, of each sample.
    """
    what = f"states of layer {group.layer}" if isinstance(group, HiddenSpec) else "logits"
    for one, sample in zip(features, samples, strict=True):
        sums_T = one.squared_norm if isinstance(one, HiddenFeatures) else one.lse
        if sums_T is None or np.isfinite(sums_T).all():
            continue
        fix = (
            "the checkpoint is damaged, or its training diverged: give an earlier one"
            if identity.dtype == "float32"
            else f"it overflows in {identity.dtype}: give another --dtype"
        )
        place = f"position {int(np.argmin(np.isfinite(sums_T)))} of sample {sample.id}"
        raise EngineError(f"TEACHER {identity.name}: its {what} are no finite numbers at {place}; {fix}")
