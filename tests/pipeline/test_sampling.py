"""Drawing one token: the frequencies are the distribution's, against a plain float64 reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.writing.sampling import draw, uniforms


def reference(scores: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """float64 [V]: softmax at a temperature, cut to the smallest set of mass top_p and made to sum to one."""
    p = np.exp((scores.astype(np.float64) - scores.max()) / temperature)
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    kept = order[: int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1]
    cut = np.zeros_like(p)
    cut[kept] = p[kept]
    return cut / cut.sum()


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 1e-9])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("vocabulary", [1, 2, 37, 1003])
def test_frequencies_are_the_distributions(vocabulary: int, temperature: float, top_p: float) -> None:
    """Evenly spaced numbers: each token comes as often as its probability says, to one count."""
    rows = 4_000
    scores = torch.from_numpy(np.random.default_rng(vocabulary).normal(size=vocabulary) * 3).float()
    points = (torch.arange(rows, dtype=torch.float64) + 0.5) / rows
    drawn = draw(scores.expand(rows, -1), points, temperature, top_p)
    counts = np.bincount(drawn.numpy(), minlength=vocabulary)
    assert np.abs(counts - rows * reference(scores.numpy(), temperature, top_p)).max() <= 1.001


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    scores = torch.randn(31, 257, generator=torch.Generator().manual_seed(1))
    points = torch.from_numpy(uniforms(9, 31))
    together = draw(scores, points, 0.7, 0.8)
    alone = [int(draw(scores[i : i + 1], points[i : i + 1], 0.7, 0.8)) for i in range(31)]
    assert together.tolist() == alone


def test_the_ends_of_the_unit_interval_and_masked_tokens() -> None:
    scores = torch.tensor([[1.0, -torch.inf, 3.0, 2.0]])
    last = torch.tensor([np.nextafter(1.0, 0.0)])
    assert draw(scores, torch.zeros(1, dtype=torch.float64), 1.0, 1.0).tolist() == [2]
    assert draw(scores, last, 1.0, 1.0).tolist() == [0]
    assert draw(scores, last, 1.0, 0.9).tolist() == [3]
    assert draw(scores, last, 0.0, 1.0).tolist() == [2]


def test_numbers_of_a_text_are_its_own_and_the_first_of_many() -> None:
    assert np.array_equal(uniforms(5, 4), uniforms(5, 9)[:4])
    assert not set(uniforms(5, 50)) & set(uniforms(6, 50))
    many = uniforms(2**63 - 1, 10_000)
    # The mean of n uniform numbers has a standard deviation of 1 / sqrt(12 n); five of them.
    assert many.min() >= 0 and many.max() < 1 and abs(many.mean() - 0.5) < 5 / np.sqrt(12 * 10_000)
