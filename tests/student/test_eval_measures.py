"""Calibration and buckets against loops in plain Python, windows and records against what they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest

from student.evaluation.record import merged
from student.evaluation.texts import windows
from student.metrics import (
    calibration_error,
    cluster_error,
    means_by,
    perplexity,
    power_edges,
    quantile_edges,
)


@pytest.mark.parametrize("bins", [1, 4, 15])
def test_calibration_error_is_the_weighted_gap_of_the_bins(bins: int) -> None:
    rng = np.random.default_rng(bins)
    confidence, right = rng.random(401).astype(np.float32), rng.random(401) < 0.3
    confidence[:3] = (0.0, 0.5, 1.0)
    wanted = 0.0
    for b in range(bins):
        inside = [
            i
            for i, c in enumerate(confidence)
            if b / bins <= c < (b + 1) / bins or (b == bins - 1 and c == 1)
        ]
        if inside:
            accuracy = sum(bool(right[i]) for i in inside) / len(inside)
            certain = sum(float(confidence[i]) for i in inside) / len(inside)
            wanted += len(inside) / 401 * abs(accuracy - certain)
    assert calibration_error(confidence, right, bins) == pytest.approx(wanted, abs=1e-12)


def test_calibration_error_of_the_certain_and_the_calibrated() -> None:
    assert calibration_error(np.ones(8), np.zeros(8, bool)) == 1.0
    assert calibration_error(np.ones(8), np.ones(8, bool)) == 0.0
    assert calibration_error(np.full(8, 0.25), np.arange(8) < 2) == 0.0


def test_buckets_by_position_are_powers_of_two() -> None:
    assert power_edges(0) == [0, 1]
    assert power_edges(8) == [0, 1, 2, 4, 8, 16]
    position = np.array([0, 1, 2, 3, 4, 7, 8])
    columns = {"kl": np.arange(7.0), "teacher_ce": np.full(7, np.nan)}
    rows = means_by(position, power_edges(8), columns, np.array([0, 0, 0, 1, 1, 1, 1]))
    assert [(row["from"], row["to"], row["positions"], row["kl"]) for row in rows] == [
        (0, 1, 1, 0.0),
        (1, 2, 1, 1.0),
        (2, 4, 2, 2.5),
        (4, 8, 2, 4.5),
        (8, 16, 1, 6.0),
    ]
    assert all(row["teacher_ce"] is None and row["teacher_ce_se"] is None for row in rows)
    # Two positions of two documents: their difference, halved. One document says nothing of its error.
    assert [row["kl_se"] for row in rows] == [None, None, pytest.approx(0.5), None, None]


def test_buckets_by_quantile_hold_everything_once() -> None:
    values = np.random.default_rng(0).gamma(1.0, 2.0, 333).astype(np.float32)
    rows = means_by(values, quantile_edges(values, 8), {"value": values}, np.arange(333))
    assert sum(int(row["positions"] or 0) for row in rows) == 333
    assert all(40 <= int(row["positions"] or 0) <= 43 for row in rows)
    for row in rows:
        inside = [v for v in values.astype(np.float64) if row["from"] <= v < row["to"]]  # type: ignore[operator]
        assert (len(inside), row["value"]) == (row["positions"], pytest.approx(sum(inside) / len(inside)))
    ties = np.array([1.0] * 9 + [2.0])
    assert [row["positions"] for row in means_by(ties, quantile_edges(ties, 4), {}, np.arange(10))] == [10]


def test_the_error_of_a_mean_is_that_of_dependent_positions() -> None:
    """Of the samples' residuals as in the textbook; and what means of many draws of samples scatter by."""
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 9, 40)
    levels = rng.gamma(2.0, 1.0, 40)  # a sample's positions have a level in common
    sums = np.array(
        [rng.normal(level, 0.3, count).sum() for level, count in zip(levels, counts, strict=True)]
    )
    mean = sum(sums) / sum(counts)
    residuals = [(s - mean * n) ** 2 for s, n in zip(sums, counts, strict=True)]
    wanted = math.sqrt(40 / 39 * sum(residuals)) / sum(counts)
    error = cluster_error(sums, counts)
    assert error == pytest.approx(wanted, rel=1e-12)
    picks = rng.integers(0, 40, (20_000, 40))
    scatter = (sums[picks].sum(1) / counts[picks].sum(1)).std()
    assert error == pytest.approx(scatter, rel=0.05)
    empty = cluster_error(np.append(sums, 0.0), np.append(counts, 0))
    assert empty == pytest.approx(wanted, rel=1e-12)  # a sample without learned positions is none
    assert cluster_error(sums[:1], counts[:1]) is None
    assert cluster_error(np.array([1.0, math.nan]), np.array([1, 1])) is None
    # Independent positions: the usual standard error of a mean.
    values = rng.normal(0.0, 1.0, 50)
    assert cluster_error(values, np.ones(50)) == pytest.approx(values.std(ddof=1) / math.sqrt(50), rel=1e-12)


def test_perplexity_stays_finite() -> None:
    assert perplexity(math.log(7)) == pytest.approx(7)
    assert math.isfinite(perplexity(1e9))


@pytest.mark.parametrize("count", [1, 6, 7, 8, 31])
def test_windows_predict_every_token_once_from_what_stands_before(count: int) -> None:
    tokens, length = list(range(10, 10 + count)), 7
    made = list(windows(tokens, 0, length))
    assert [token for _, predicted in made for token in predicted] == tokens
    assert made[0][0] == [0]
    seen = 0
    for context, predicted in made:
        assert len(context) + len(predicted) - 1 <= length  # the last token is never read
        assert seen == 0 or context == tokens[seen - len(context) : seen]
        seen += len(predicted)
    assert all(len(c) + len(p) - 1 == length for c, p in made if count >= length)


def record(**changes: object) -> dict[str, object]:
    none = dict.fromkeys(("teacher", "teacher_dtype", "cache", "trained", "prompts"))
    return {"weights": "a", "texts": [], "tasks": []} | none | changes


def test_a_later_evaluation_replaces_only_what_it_measured() -> None:
    one = {"name": "one", "student": 1, "teacher": 2}
    task = {"task": "t", "metric": "f1", "filter": "none", "student": 1, "teacher": 2, "teacher_stderr": 3}
    old = record(teacher="big", teacher_dtype="auto", cache={"kl": 1}, texts=[one], tasks=[task])
    other = {"name": "two", "student": 3, "teacher": None}
    both = merged(old, record(texts=[other]))
    assert (both["cache"], both["texts"], both["tasks"]) == ({"kl": 1}, [one, other], [task])
    assert (both["teacher"], both["teacher_dtype"]) == ("big", "auto")
    again = one | {"student": 9}
    assert merged(old, record(texts=[again]))["texts"] == [again]
    assert merged(old, record(cache={"kl": 5}))["cache"] == {"kl": 5}
    exact = task | {"metric": "exact"}
    assert merged(old, record(tasks=[exact]))["tasks"] == [task, exact]


def test_figures_of_other_weights_or_another_teacher_are_dropped() -> None:
    one = {"name": "one", "student": 1, "teacher": 2}
    old = record(teacher="big", cache={"kl": 1}, texts=[one])
    fresh = record(weights="b", texts=[])
    assert merged(old, fresh) == fresh
    kept = merged(old, record(teacher="bigger"))
    assert (kept["teacher"], kept["texts"], kept["cache"]) == ("bigger", [one | {"teacher": None}], {"kl": 1})
