"""Axolotl's prepared data sets for distillation: input_ids, target_token_ids, target_logprobs, target_mask.

The layout, and where it was read: docs/exchange.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from pipeline.errors import RequestError
from pipeline.interchange.layouts.base import Document, flat, learned_tokens, nested, split_packed

_NEEDED = ["input_ids", "target_token_ids", "target_logprobs"]
_OPTIONAL = ["target_mask", "labels", "attention_mask"]


class Axolotl:
    """Row t describes the token at t + 1 (`own` False, since June 2025) or the one at t (before)."""

    def __init__(self, columns: list[str], own: bool) -> None:
        """RequestError when the columns do not fit."""
        if not set(_NEEDED) <= set(columns):
            raise RequestError(
                f"--layout axolotl: needs the columns {', '.join(_NEEDED)}, as `axolotl preprocess` makes "
                f"them; there are {', '.join(columns)}"
            )
        self.columns = [c for c in (*_NEEDED, *_OPTIONAL) if c in columns]
        self._own = own

    def documents(self, row: Any) -> Iterator[Document]:
        tokens = flat(row, "input_ids")
        assert tokens is not None
        counts, ids = nested(row, "target_token_ids")
        widths, logprobs = nested(row, "target_logprobs")
        logprobs = logprobs.astype(np.float64)
        if not np.array_equal(counts, widths):
            raise RequestError("DATASET: target_logprobs of other lengths than target_token_ids")
        if "target_mask" in self.columns and row.column("target_mask")[0].is_valid:
            masked, mask = nested(row, "target_mask")
            if not np.array_equal(counts, masked):
                raise RequestError("DATASET: target_mask of other lengths than target_token_ids")
            logprobs = np.where(mask.astype(np.bool_), logprobs, -np.inf)
        if len(counts) > len(tokens):
            raise RequestError(f"DATASET: {len(counts)} distributions for {len(tokens)} tokens")
        missing = np.zeros(len(tokens) - len(counts), np.int64)
        whole = Document(
            tokens=tokens.astype(np.int64),
            learned=learned_tokens(row, tokens),
            counts=np.concatenate([counts, missing]),
            ids=np.nan_to_num(ids, nan=-1).astype(np.int64),
            logprobs=np.where(np.isnan(ids.astype(np.float64)), -np.inf, logprobs),
        )
        for one in split_packed(whole, flat(row, "attention_mask")):
            yield _moved(one) if self._own else one


def _moved(document: Document) -> Document:
    """Rows of the tokens themselves as rows of the next ones: the first goes, the last position has none."""
    counts = document.counts
    return replace(
        document,
        counts=np.append(counts[1:], 0),
        ids=document.ids[counts[0] :],
        logprobs=document.logprobs[counts[0] :],
    )
