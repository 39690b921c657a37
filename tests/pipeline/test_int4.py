"""Rows of int4: what stands in them, by a plain reading in float64; how far that is from what was given."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from featurestore.format.int4 import Int4Layout, decode_int4, levels
from pipeline.capture.int4 import encode_int4
from student.data.decoding import INT4, decode_hidden

SIZES = (1, 3, 64, 65, 191, 192, 577, 1000)
EPSILON = float(np.finfo(np.float32).eps)
LEVELS = levels(np.arange(16, dtype=np.float32)).astype(np.float64)


def states(size: int, rows: int = 9) -> torch.Tensor:
    """Of very different lengths; a row of zeros, and one in which a column is a thousand times the others."""
    generator = torch.Generator().manual_seed(size)
    drawn = torch.randn(rows, size, generator=generator) * torch.logspace(-3, 4, rows)[:, None]
    drawn[4] = 0.0
    drawn[5, size // 2] *= 1000
    return drawn


def rotation(size: int) -> np.ndarray:
    """float64 [P, P]: signs of the columns, then Sylvester's Hadamard matrix of each block of 64."""
    hadamard = np.ones((1, 1))
    while len(hadamard) < 64:
        hadamard = np.kron([[1, 1], [1, -1]], hadamard)
    blocks = -(-size // 64)
    signs = []
    for column in range(64 * blocks):
        z = column + 1
        z = ((z ^ (z >> 16)) * 0x7FEB352D) % 2**32
        z = ((z ^ (z >> 15)) * 0x846CA68B) % 2**32
        signs.append(1 - 2 * ((z ^ (z >> 16)) & 1))
    return np.kron(np.eye(blocks), hadamard / 8) * np.array(signs)


def parts(rows: np.ndarray, size: int) -> tuple[np.ndarray, ...]:
    """Codes [N, P], scales [N, S], columns [N, K] and outliers [N, D] of rows of bytes, as the page says."""
    blocks, outliers = -(-size // 64), size // 192
    starts = np.cumsum([0, 32 * blocks, 2 * blocks, 2 * outliers, 2 * outliers])
    assert rows.shape[1] == starts[-1]
    codes, *words = (rows[:, a:b] for a, b in pairwise(starts))
    codes = np.stack([codes & 15, codes >> 4], axis=2).reshape(len(rows), -1)
    numbers = [np.frombuffer(word.tobytes(), "<u2").reshape(len(rows), -1) for word in words]
    scale, values = ((bits.astype(np.uint32) << 16).view(np.float32) for bits in (numbers[0], numbers[2]))
    added = np.zeros((len(rows), size))
    for row, columns in enumerate(numbers[1]):
        added[row, columns] += values[row]
    return codes, scale.astype(np.float64), numbers[1], added


@pytest.mark.parametrize("size", SIZES)
def test_a_row_holds_the_nearest_levels_of_the_rotated_rest(size: int) -> None:
    given = states(size)
    rows = encode_int4(given)[0].numpy()
    codes, scale, columns, added = parts(rows, size)
    for row, kept in enumerate(columns):
        largest = np.sort(np.abs(given[row].numpy()))[::-1][: len(kept)]
        np.testing.assert_array_equal(np.sort(np.abs(given[row].numpy()[kept]))[::-1], largest)
    rest = np.zeros((len(rows), codes.shape[1]))
    rest[:, :size] = given.double().numpy() - added
    rotated = (rest @ rotation(size).T).reshape(len(rows), -1, 64)
    # Six sums of float32 in each number, of at most the block's length.
    rounding = 8 * EPSILON * np.linalg.norm(rotated, axis=2)
    top = np.abs(rotated).max(axis=2)
    assert (np.abs(np.abs(scale) - top) <= 2.0**-8 * top + rounding).all()
    found = LEVELS[codes].reshape(rotated.shape) * scale[:, :, None]
    nearest = np.abs(LEVELS * scale[:, :, None, None] - rotated[..., None]).min(-1)
    assert (np.abs(found - rotated) <= nearest + 2 * rounding[:, :, None]).all()

    decoded = decode_int4(rows, size)
    plain = (found.reshape(len(rows), -1) @ rotation(size))[:, :size] + added
    bound = 8 * EPSILON * (np.linalg.norm(found.reshape(len(rows), -1), axis=1) + np.abs(added).max(axis=1))
    assert (np.abs(decoded - plain).max(axis=1) <= bound).all()


@pytest.mark.parametrize("size", SIZES)
def test_numpy_and_torch_read_the_same_bits(size: int) -> None:
    rows = encode_int4(states(size))[0]
    found = decode_hidden({f"{INT4}{size}": rows.view(3, 3, -1)})
    assert found.shape == (3, 3, size)
    np.testing.assert_array_equal(found.view(9, size).numpy(), decode_int4(rows.numpy(), size))


@pytest.mark.parametrize("size", SIZES)
def test_the_error_is_measured(size: int) -> None:
    given = states(size)
    rows, measured = encode_int4(given)
    difference = decode_int4(rows.numpy(), size).astype(np.float64) - given.double().numpy()
    error, length = np.linalg.norm(difference, axis=1), np.linalg.norm(given.double().numpy(), axis=1)
    assert (np.abs(measured.sqrt().numpy() - error) <= 32 * EPSILON * (error + length)).all()
    assert not measured[4] and not difference[4].any()


def test_a_huge_channel_costs_the_others_nothing() -> None:
    """0.086 of the length for numbers that are Gaussian, about what 16 levels for each block of 64 allow."""
    plain = torch.randn(400, 768, generator=torch.Generator().manual_seed(0))
    huge = plain.clone()
    huge[:, 5], huge[:, 700] = 3000.0, -800.0
    for given in (plain, huge):
        error = torch.from_numpy(decode_int4(encode_int4(given)[0].numpy(), 768)) - given
        error[:, [5, 700]] = 0.0
        assert 0.08 < (error.norm() / plain.norm()).item() < 0.09
    assert Int4Layout(768).row_bytes / 768 < 0.555
