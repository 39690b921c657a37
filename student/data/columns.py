"""Columns of sparse targets that stand for one token: their sum, and the order that targets have.

Shape letters: N positions, C columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Of padding, while columns are sorted: no token, and behind them all (vocabularies end below it).
PADDING = 2**31 - 1


def run_sums(values_NC: Tensor, ids_NC: Tensor, most: int) -> Tensor:
    """In the first column of each run of equal ids the sum over the run, which has `most` columns at most;
    what is in the others is of no use. In a fixed order, so that a GPU rounds as in every run.
    """
    sums_NC, step = values_NC, 1
    while step < most:  # after it, a column holds the sum of 2 * step of its run from there on
        same_NC = ids_NC[:, step:] == ids_NC[:, :-step]
        added_NC = sums_NC[:, :-step] + sums_NC[:, step:].masked_fill(~same_NC, 0.0)
        sums_NC = torch.cat([added_NC, sums_NC[:, -step:]], -1)
        step *= 2
    return sums_NC


def first_of_runs(ids_NC: Tensor) -> Tensor:
    """bool [N, C]: whether a column of sorted ids is the first one of its token; padding is of none."""
    first_NC = ids_NC != PADDING
    first_NC[:, 1:] &= ids_NC[:, 1:] != ids_NC[:, :-1]
    return first_NC


def best_first(scores_NC: Tensor, *columns: Tensor) -> list[Tensor]:
    """Columns [N, C] with the one of the best score in exchange for the first."""
    best_N1 = scores_NC.argmax(-1, keepdim=True)
    place_NC = torch.arange(scores_NC.shape[1], device=scores_NC.device).expand_as(scores_NC).clone()
    place_NC.scatter_(1, best_N1, 0)
    place_NC[:, :1] = best_N1
    return [values_NC.gather(-1, place_NC) for values_NC in columns]
