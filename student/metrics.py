"""Plain numbers about arrays of positions: calibration, perplexity, means by bucket.

Shape letters: N positions, C bins.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from featurestore.format.schema import LogitsSpec

Array = npt.NDArray[Any]

CALIBRATION_BINS = 15


def perplexity(nats: float) -> float:
    """exp of a mean in nats, finite."""
    return math.exp(min(nats, 700.0))


def kl_exactness(logits: LogitsSpec, vocab_size: int) -> str:
    """What KL(teacher || student) from stored rows of this kind is of the KL over the whole vocabulary."""
    if logits.top_k >= vocab_size and logits.top_p is None:
        return "exact"
    return "unbiased" if logits.tail else "lower bound"


def calibration_error(confidence_N: Array, right_N: Array, bins: int = CALIBRATION_BINS) -> float:
    """Expected calibration error: mean over bins of equal width of |share right - mean confidence|, each bin
    weighted by its positions (Guo et al. 2017, arXiv:1706.04599).

    confidence: probabilities of the most likely token, in [0, 1]; right: whether it was the next one.
    """
    bin_N = np.minimum((confidence_N * bins).astype(np.int64), bins - 1)
    gap_N = right_N.astype(np.float64) - confidence_N.astype(np.float64)
    return float(np.abs(np.bincount(bin_N, gap_N, bins)).sum() / len(confidence_N))


def power_edges(longest: int) -> list[float]:
    """0, 1, 2, 4, ... beyond `longest`: the edges of half-open buckets of positions."""
    edges = [0.0, 1.0]
    while edges[-1] <= longest:
        edges.append(edges[-1] * 2)
    return edges


def quantile_edges(values_N: Array, count: int) -> list[float]:
    """Edges of at most `count` half-open buckets of about equally many values; equal values share one."""
    inner = np.unique(np.quantile(values_N, np.arange(count) / count, method="lower"))
    return [*inner.tolist(), float(np.nextafter(values_N.max(), np.inf, dtype=np.float64))]


def means_by(
    values_N: Array, edges: Sequence[float], columns: Mapping[str, Array], cluster_N: Array
) -> list[dict[str, float | int | None]]:
    """For each bucket edges[i] <= value < edges[i + 1] that is not empty: from, to, positions, and of every
    column the mean and, as `NAME_se`, its standard error (None where it is not known at all of them).

    cluster_N: the cluster that each position belongs to, see `cluster_error`.
    """
    bucket_N = np.searchsorted(np.asarray(edges), values_N, side="right") - 1
    rows: list[dict[str, float | int | None]] = []
    for index, (low, high) in enumerate(itertools.pairwise(edges)):
        chosen_N = bucket_N == index
        if chosen_N.any():
            inside_N = cluster_N[chosen_N]
            row: dict[str, float | int | None] = {"from": low, "to": high, "positions": int(chosen_N.sum())}
            for name, column_N in columns.items():
                row[name] = mean(column_N[chosen_N])
                row[f"{name}_se"] = error_of_mean(column_N[chosen_N], inside_N)
            rows.append(row)
    return rows


def error_of_mean(values_N: Array, cluster_N: Array) -> float | None:
    """Standard error of the mean of values at positions, of which those of one cluster depend on each other;
    see `cluster_error`.
    """
    return cluster_error(np.bincount(cluster_N, values_N), np.bincount(cluster_N))


def cluster_error(sums_G: Array, counts_G: Array) -> float | None:
    """Standard error of the mean per position, sum(sums) / sum(counts), where positions of one cluster, a
    document, depend on each other: that of a ratio estimator (Cochran, Sampling Techniques, 6.4). sums and
    counts are per cluster. None for fewer than two clusters with positions, or where a value is not known.
    """
    sums_G, counts_G = sums_G[counts_G > 0].astype(np.float64), counts_G[counts_G > 0].astype(np.float64)
    clusters, total = len(counts_G), counts_G.sum()
    if clusters < 2:
        return None
    left_G = sums_G - sums_G.sum() / total * counts_G
    error = float(np.sqrt(clusters / (clusters - 1) * np.square(left_G).sum()) / total)
    return error if math.isfinite(error) else None


def mean(values_N: Array) -> float | None:
    """In float64; None where a value is not known (NaN)."""
    value = float(values_N.mean(dtype=np.float64))
    return value if math.isfinite(value) else None
