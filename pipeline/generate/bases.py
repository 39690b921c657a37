"""Final states in a basis: the store's where it has one, else one calibrated on the shard at hand."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from threading import Lock

import numpy as np

from featurestore.format.schema import GroupFeatures, GroupSpec, HiddenFeatures, HiddenSpec
from featurestore.format.sidecar import checked_part, part_file
from featurestore.format.states.transform import TRANSFORMED, Basis, decode_transformed, encode_transformed
from featurestore.store import FeatureStore


class Bases:
    """Encodes what an engine captured as float32, for the threads of one process.

    Whoever is first calibrates on its shard and puts the basis into teacher/, where a name's first content
    stays; the others wait, and other processes and machines take the one that is there, as who was second
    does. told: what there is to report, by a thread that may.
    """

    def __init__(self, store: FeatureStore) -> None:
        self._store, self.told = store, deque[str]()
        self._lock, self._bases = Lock(), dict[str, Basis]()

    def encode(self, group: GroupSpec, features: Sequence[GroupFeatures]) -> Sequence[GroupFeatures]:
        """The features of a shard's samples as the group stores them."""
        if not isinstance(group, HiddenSpec) or group.dtype not in TRANSFORMED:
            return features
        given = [one.values for one in features if isinstance(one, HiddenFeatures)]
        basis = self._basis(group.dtype, given)
        return [_encoded(states_TD, basis) for states_TD in given]

    def _basis(self, dtype: str, given: Sequence[np.ndarray]) -> Basis:
        with self._lock:
            if dtype not in self._bases:
                self._bases[dtype] = self._store.basis(dtype) or self._calibrated(dtype, given)
            return self._bases[dtype]

    def _calibrated(self, dtype: str, given: Sequence[np.ndarray]) -> Basis:
        from pipeline.teacher.basis import (  # brings torch, which a look at a store needs not
            ENOUGH,
            calibrate,
        )

        states_ND = np.concatenate(given)
        rows, size = states_ND.shape
        few = f" (better: {ENOUGH * size:,} or more)" if rows < ENOUGH * size else ""
        self.told.append(f"calibrated the basis of {dtype} on the {rows:,} positions of a shard{few}")
        head = checked_part(self._store.root, *self._store.sidecar()["head"], self._store.identity)
        name, data = part_file(*calibrate(states_ND, head, dtype))
        self._store.put_teacher_files({name: data})
        basis = self._store.basis(dtype)
        assert basis is not None, "it was put there"
        return basis


def _encoded(states_TD: np.ndarray, basis: Basis) -> HiddenFeatures:
    rows_TW = encode_transformed(states_TD, basis)
    error_TD = decode_transformed(rows_TW, basis) - states_TD
    return HiddenFeatures(
        rows_TW,
        None,
        basis.dtype,
        squared_error=np.square(error_TD).sum(axis=1),
        squared_norm=np.square(states_TD).sum(axis=1),
        basis=basis,
    )
