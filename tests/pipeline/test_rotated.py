"""Rows of int4 and int2: what stands in them, by a plain reading in float64; how far it is off."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given as drawn
from hypothesis import strategies as st

from featurestore.format.states.rotated import RotatedLayout, decode_rotated, levels
from pipeline.capture.rotated import encode_rotated
from student.data.decoding import decode_hidden

SIZES = (1, 3, 64, 65, 191, 192, 577, 1000)
EPSILON = float(np.finfo(np.float32).eps)
BITS = {"int4": 4, "int2": 2}
both = pytest.mark.parametrize("dtype", BITS)
sizes = pytest.mark.parametrize("size", SIZES)


def states(size: int, rows: int = 9) -> torch.Tensor:
    """Of very different lengths; a row of zeros, and one in which a column is a thousand times the others."""
    generator = torch.Generator().manual_seed(size)
    drawn = torch.randn(rows, size, generator=generator) * torch.logspace(-3, 4, rows)[:, None]
    drawn[4] = 0.0
    drawn[5, size // 2] *= 1000
    return drawn


def levels_of(bits: int) -> np.ndarray:
    return np.asarray(levels(np.arange(2**bits, dtype=np.float32), bits), np.float64)


def rotation(size: int, pattern: int) -> np.ndarray:
    """float64 [P, P]: signs of the columns, then Sylvester's Hadamard matrix of each block of 64."""
    hadamard = np.ones((1, 1))
    while len(hadamard) < 64:
        hadamard = np.kron([[1, 1], [1, -1]], hadamard)
    blocks = -(-size // 64)
    signs = []
    for column in range(64 * blocks):
        z = column + int(pattern) + 1
        z = ((z ^ (z >> 16)) * 0x7FEB352D) % 2**32
        z = ((z ^ (z >> 15)) * 0x846CA68B) % 2**32
        signs.append(1 - 2 * ((z ^ (z >> 16)) & 1))
    return np.kron(np.eye(blocks), hadamard / 8) * np.array(signs)


def parts(rows: np.ndarray, size: int, bits: int) -> tuple[np.ndarray, ...]:
    """Codes [N, P], scales [N, S], columns [N, K], outliers [N, D] and patterns [N] of rows of bytes, as the
    page says.
    """
    blocks, outliers = -(-size // 64), max(size // 192, 1 if bits == 2 else 0)
    starts = np.cumsum([0, 8 * bits * blocks, 2 * blocks, 2 * outliers, 2 * outliers])
    assert rows.shape[1] == starts[-1]
    codes, *words = (rows[:, a:b] for a, b in pairwise(starts))
    places = [codes >> shift & (2**bits - 1) for shift in range(0, 8, bits)]
    codes = np.stack(places, axis=2).reshape(len(rows), -1)
    numbers = [np.frombuffer(word.tobytes(), "<u2").reshape(len(rows), -1) for word in words]
    scale, values = ((bits.astype(np.uint32) << 16).view(np.float32) for bits in (numbers[0], numbers[2]))
    added = np.zeros((len(rows), size))
    for row, columns in enumerate(numbers[1]):
        added[row, columns] += values[row]
    chosen = [
        sum((2 * place + 1) * byte for place, byte in enumerate(row[starts[2] :].tolist())) % 256
        for row in rows
    ]
    patterns = np.array(chosen if bits == 2 else [0] * len(rows))
    return codes, scale.astype(np.float64), numbers[1], added, patterns


@both
@sizes
def test_a_row_holds_the_nearest_levels_of_the_rotated_rest(size: int, dtype: str) -> None:
    given, table = states(size), levels_of(BITS[dtype])
    rows = encode_rotated(given, dtype)[0].numpy()
    codes, scale, columns, added, patterns = parts(rows, size, BITS[dtype])
    for row, kept in enumerate(columns):
        largest = np.sort(np.abs(given[row].numpy()))[::-1][: len(kept)]
        np.testing.assert_array_equal(np.sort(np.abs(given[row].numpy()[kept]))[::-1], largest)
    rest = np.zeros((len(rows), codes.shape[1]))
    rest[:, :size] = given.double().numpy() - added
    turns = [rotation(size, pattern) for pattern in patterns]
    rotated = np.stack([turn @ row for turn, row in zip(turns, rest, strict=True)]).reshape(len(rows), -1, 64)
    # Six sums of float32 in each number, of at most the block's length.
    rounding = 8 * EPSILON * np.linalg.norm(rotated, axis=2)
    found = table[codes].reshape(rotated.shape)
    if dtype == "int4":
        step = np.abs(scale)
        top = np.abs(rotated).max(axis=2)
        assert (np.abs(step - top) <= 2.0**-8 * top + rounding).all()
        step = scale
    else:
        step = np.sqrt(np.square(rotated).mean(axis=2))
        along = (found * scale[:, :, None] * rotated).sum(axis=2)
        square = np.square(rotated).sum(axis=2)
        # The rounding of bfloat16; each of 64 products within the rounding of both of its factors.
        assert (np.abs(along - square) <= 2.0**-8 * square + 64 * rounding * np.sqrt(square)).all()
    nearest = np.abs(table * step[:, :, None, None] - rotated[..., None]).min(-1)
    assert (np.abs(found * step[:, :, None] - rotated) <= nearest + 4 * rounding[:, :, None]).all()

    decoded = decode_rotated(rows, dtype, size)
    found = (found * scale[:, :, None]).reshape(len(rows), -1)
    plain = np.stack([row @ turn for turn, row in zip(turns, found, strict=True)])[:, :size] + added
    bound = 8 * EPSILON * (np.linalg.norm(found, axis=1) + np.abs(added).max(axis=1))
    assert (np.abs(decoded - plain).max(axis=1) <= bound).all()


@both
@drawn(size=st.integers(1, 700), seed=st.integers(0, 2**32), rows=st.integers(1, 40))
def test_numpy_and_torch_read_the_same_bits_whatever_the_batch(
    size: int, seed: int, rows: int, dtype: str
) -> None:
    given = torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) ** 3
    coded = encode_rotated(given, dtype)[0]
    found = decode_hidden({f"{dtype}.{size}": coded[None]})
    np.testing.assert_array_equal(found[0].numpy(), decode_rotated(coded.numpy(), dtype, size))
    np.testing.assert_array_equal(
        coded[rows // 2].numpy(), encode_rotated(given[rows // 2][None], dtype)[0][0]
    )


@both
@sizes
def test_the_error_is_measured(size: int, dtype: str) -> None:
    given = states(size)
    rows, measured = encode_rotated(given, dtype)
    difference = decode_rotated(rows.numpy(), dtype, size).astype(np.float64) - given.double().numpy()
    error, length = np.linalg.norm(difference, axis=1), np.linalg.norm(given.double().numpy(), axis=1)
    assert (np.abs(measured.sqrt().numpy() - error) <= 32 * EPSILON * (error + length)).all()
    assert not measured[4] and not difference[4].any()


@pytest.mark.parametrize(
    ("dtype", "low", "high", "number_bytes"), [("int4", 0.08, 0.09, 0.555), ("int2", 0.33, 0.37, 0.305)]
)
def test_a_huge_channel_costs_the_others_nothing(
    dtype: str, low: float, high: float, number_bytes: float
) -> None:
    """Of numbers that are Gaussian int4 loses 0.086 of the length, about what 16 levels for each block of 64
    allow, and int2, with its scale, sqrt(d / (1 - d)) = 0.365, d = 0.1175 for 4 levels of Lloyd and Max.
    """
    plain = torch.randn(400, 768, generator=torch.Generator().manual_seed(0))
    huge = plain.clone()
    huge[:, 5], huge[:, 700] = 3000.0, -800.0
    for given in (plain, huge):
        error = torch.from_numpy(decode_rotated(encode_rotated(given, dtype)[0].numpy(), dtype, 768)) - given
        error[:, [5, 700]] = 0.0
        assert low < (error.norm() / plain.norm()).item() < high
    assert RotatedLayout(dtype, 768).row_bytes / 768 < number_bytes


def test_what_two_bits_lose_averages_out_over_positions() -> None:
    """Of 4,096 states that differ by a hundredth, as a token's do in different contexts, the mean is within
    4 standard errors of 256 patterns; with the same signs at every position it would be off by 0.35.
    """
    one = torch.randn(1, 576, generator=torch.Generator().manual_seed(0))
    many = one * (1 + 1e-2 * torch.randn(4096, 576, generator=torch.Generator().manual_seed(1)))
    found = torch.from_numpy(decode_rotated(encode_rotated(many, "int2")[0].numpy(), "int2", 576))
    off = (found.mean(0) - many.mean(0)).norm() / one.norm()
    assert off < 4 * 0.365 / 256**0.5
