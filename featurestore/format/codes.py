"""Features in the numbers that the store holds: what is read, before anything is decoded.

A training run moves these small integers to its device and decodes them there (`student.data.decoding`);
everything else asks for `LogitsFeatures`, which `decode` gives.

T positions of a sample, nnz head entries of all T rows together, M tail draws of a row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from featurestore.format.codec import (
    CLOSED,
    decode_entropy,
    decode_head,
    decode_labels,
    decode_rows,
    encode_odds,
    head_mass,
    narrow_mask,
    row_starts,
)
from featurestore.format.schema import NO_DRAW, LogitsFeatures, LogitsSpec
from featurestore.format.tail import first_draws, row_shifts

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False, kw_only=True)
class LogitsCodes:
    """One sample's rows of a logits group, ragged rows one after the other (CSR); see docs/FORMAT.md.

    counts: uint8 or uint16 [T], head size of each row, >= 1. ids: uint32 [nnz], by descending logit in each
    row. gaps: uint16 [nnz] and odds: int16 [T], shape and mass of the heads (featurestore.format.codec). lse:
    int32 [T], label_logprob: uint32 [T] and entropy: uint16 [T], in steps of 1/64 nat; the largest code of
    the last two: not known. draws: int32 [T, M], ids from outside the head, equal ones side by side; a row
    without a tail repeats its own top id. repeats: int32 [T, M], how often a draw occurs at the first of
    equal ones, 0 at the others. Both None when nothing is drawn.
    """

    counts: Array
    ids: Array
    gaps: Array
    odds: Array
    lse: Array
    label_logprob: Array
    entropy: Array
    draws: Array | None = None
    repeats: Array | None = None

    def decode(self) -> LogitsFeatures:
        """The features, within the bounds of featurestore.format.codec."""
        lse = decode_rows(self.lse)
        return LogitsFeatures(
            counts=self.counts.astype(np.uint16),
            ids=self.ids,
            logits=decode_head(self.counts, self.gaps, self.odds, lse),
            lse=lse,
            label_logprob=decode_labels(self.label_logprob),
            entropy=decode_entropy(self.entropy),
            tail_ids=self._tail_ids(),
        )

    def closed(self, vocab_size: int) -> LogitsCodes:
        """The same, with no mass outside the heads that hold all `vocab_size` tokens: what is stored for
        those is the rounding of their logsumexp, about 1e-7.
        """
        whole = self.counts == vocab_size
        return replace(self, odds=np.where(whole, np.int16(CLOSED), self.odds)) if whole.any() else self

    def narrow(self, spec: LogitsSpec, tokens: Array) -> LogitsCodes:
        """What a capture with the smaller `spec` keeps of these rows; `tokens`: int32 [T], the sample.

        With top_p the cut is found from the stored logits, so it can fall one rank beside the capture's own;
        the mass of a cut head is rounded a second time. Fewer draws are the first ones of more.
        """
        if spec.tail and self.draws is not None:
            shifts = row_shifts(tokens, 0, len(tokens), spec.seed)
            chosen = first_draws(shifts, self.draws.shape[1], spec.tail)
            draws = np.sort(self.draws, axis=1)[chosen].reshape(-1, spec.tail)
            return replace(self, draws=draws, repeats=count_repeats(draws))
        zero = np.zeros(len(self.counts), np.float32)
        logprob = decode_head(self.counts, self.gaps, self.odds, zero)
        keep = narrow_mask(self.counts, logprob, zero, spec.top_k, spec.top_p)
        counts = np.add.reduceat(keep, row_starts(self.counts)[:-1], dtype=self.counts.dtype)
        return replace(
            self,
            counts=counts,
            ids=self.ids[keep],
            gaps=self.gaps[keep],
            odds=np.where(
                counts < self.counts, encode_odds(head_mass(counts, logprob[keep], zero)), self.odds
            ),
            draws=None,
            repeats=None,
        )

    def _tail_ids(self) -> Array | None:
        if self.draws is None:
            return None
        tops = self.ids[row_starts(self.counts)[:-1]]
        ascending = np.sort(self.draws, axis=1)
        return np.where((self.draws[:, 0] == tops)[:, None], np.int32(NO_DRAW), ascending)


def count_repeats(draws: Array) -> npt.NDArray[np.int32]:
    """int32 [T, M]: how often a draw occurs, at the first of equal ones, which lie side by side; else 0."""
    first = np.ones(draws.shape, dtype=np.bool_)
    np.not_equal(draws[:, 1:], draws[:, :-1], out=first[:, 1:])
    out = np.zeros(draws.shape, np.int32)
    out[first] = np.diff(np.flatnonzero(first), append=first.size)
    return out
