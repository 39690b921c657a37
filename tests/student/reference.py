"""The teacher's sparse distribution of decoded features, spelled out row by row in float64."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import torch
from torch import Tensor

from featurestore.format.schema import NO_DRAW, LogitsFeatures
from student.losses.sparse import SparseTargets


def rows_of(features: LogitsFeatures) -> list[tuple[dict[int, float], float, float]]:
    """Of each row: probability by token id, head first, then draws; what is left outside; entropy or NaN."""
    rows, start = [], 0
    for t, count in enumerate(features.counts.tolist()):
        entries = slice(start, start + count)
        start += count
        logprob = features.logits[entries].astype(np.float64) - float(features.lse[t])
        p = dict(zip(features.ids[entries].tolist(), np.exp(logprob).tolist(), strict=True))
        outside = max(0.0, 1.0 - sum(p.values()))
        draws = [] if features.tail_ids is None else features.tail_ids[t].tolist()
        if not draws or draws[0] == NO_DRAW:
            rows.append((p, outside, math.nan))
            continue
        p |= {token: times / len(draws) * outside for token, times in Counter(draws).items()}
        rows.append((p, 0.0, float(features.entropy[t])))
    return rows


def targets_of(features: LogitsFeatures, labels: Tensor) -> SparseTargets:
    """The same as padded columns, heads before draws, float64."""
    rows, counts = rows_of(features), features.counts.tolist()
    heads = [list(p)[:count] for (p, _, _), count in zip(rows, counts, strict=True)]
    draws = [list(p)[count:] for (p, _, _), count in zip(rows, counts, strict=True)]
    widths = max(map(len, heads)), max(map(len, draws))
    ids, columns = [], []
    for (p, _, _), *parts in zip(rows, heads, draws, strict=True):
        padded = [token for part, width in zip(parts, widths, strict=True) for token in _padded(part, width)]
        ids.append([parts[0][0] if token is None else token for token in padded])
        columns.append([0.0 if token is None else p[token] for token in padded])
    outside = torch.tensor([rest for _, rest, _ in rows], dtype=torch.float64)
    entropy = torch.tensor([h for _, _, h in rows], dtype=torch.float64)
    return SparseTargets(
        ids_NK=torch.tensor(ids),
        logprob_NK=torch.tensor(columns, dtype=torch.float64).log(),
        tail_N=outside.log(),
        label_N=labels,
        entropy_N=None if features.tail_ids is None else entropy,
        draws=widths[1],
    )


def _padded(tokens: list[int], width: int) -> list[int | None]:
    return [*tokens, *[None] * (width - len(tokens))]
