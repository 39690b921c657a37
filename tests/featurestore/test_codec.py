"""Number codecs: round trips within the documented bounds, at real vocabulary widths."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from featurestore.format import codec
from featurestore.format.kinds.table import pack
from featurestore.format.schema import LogitsFeatures, LogitsSpec
from tests.featurestore.helpers import identity, logits, sample


def ragged(draw: st.DrawFn, width: int) -> tuple[np.ndarray, np.ndarray]:
    counts = np.array(draw(st.lists(st.integers(1, width), min_size=1, max_size=12)), dtype=np.uint16)
    size = int(counts.sum(dtype=np.int64))
    finite = st.floats(-4000, 4000, width=32)
    logits = draw(hnp.arrays(np.float32, size, elements=finite))
    starts = codec.row_starts(counts)
    for low, high in itertools.pairwise(starts):
        logits[low:high] = -np.sort(-logits[low:high])
    return counts, logits


@st.composite
def heads(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    return ragged(draw, draw(st.sampled_from([1, 2, 50, 512])))


def logsumexps(counts: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """float64 [R] over each row's head alone."""
    rows = itertools.pairwise(codec.row_starts(counts))
    return np.array([np.logaddexp.reduce(logits[a:b].astype(np.float64)) for a, b in rows])


@given(heads(), st.floats(0.0, 30.0))
@example((np.array([2, 1], np.uint16), np.array([1.0, 8.8914043e-13, 8.8914043e-13], np.float32)), 0.0)
@settings(max_examples=60, deadline=None)
def test_heads_round_trip_within_the_bound_at_every_rank(
    head: tuple[np.ndarray, np.ndarray], outside: float
) -> None:
    counts, logits = head
    lse = (logsumexps(counts, logits) + outside).astype(np.float32)
    gaps, odds = codec.encode_head(counts, logits, lse)
    assert gaps.dtype == np.uint16 and odds.dtype == np.int16
    # Logits of 4,000 leave float32 little behind the point, so the bound is tested around zero.
    decoded = codec.decode_head(counts, gaps, odds, np.zeros_like(lse))
    exact = logits.astype(np.float64) - np.repeat(lse, counts)
    near = exact > -codec.MAX_DROP / codec.STEPS_PER_NAT
    bound = codec.LOGPROB_ERROR + 1e-6 * np.abs(exact) + np.spacing(np.abs(np.repeat(lse, counts)))
    assert (np.abs(decoded - exact)[near] <= bound[near]).all()
    assert (decoded[~near] < -2000).all()
    assert (np.diff(decoded)[codec._inside(codec.row_starts(counts)[:-1], len(decoded))] <= 0).all()


@given(heads(), st.floats(1e-3, 20.0))
@settings(max_examples=40, deadline=None)
def test_no_row_holds_more_than_all_mass_and_tails_keep_their_size(
    head: tuple[np.ndarray, np.ndarray], outside: float
) -> None:
    counts, logits = head[0], head[1] / 100
    lse = logsumexps(counts, logits) + outside
    stored = codec.encode_head(counts, logits, lse)
    mass = codec.head_mass(counts, codec.decode_head(counts, *stored, np.zeros_like(lse)), np.zeros_like(lse))
    exact = np.exp(-outside)
    assert (mass <= 1 + 1e-6).all()
    half = 1 / (2 * codec.ODDS_STEPS)
    np.testing.assert_allclose(np.log(mass), -outside, atol=half * (1 - exact) + 1e-5)
    np.testing.assert_allclose(np.log(1 - mass), np.log(1 - exact), atol=half * exact + 1e-3)


def test_a_head_of_all_the_mass_stays_closed() -> None:
    logits = np.array([3.0, 1.0], np.float32)
    lse = logsumexps(np.array([2]), logits).astype(np.float32) - np.float32(1e-6)
    gaps, odds = codec.encode_head(np.array([2], np.uint16), logits, lse)
    assert odds.tolist() == [codec.CLOSED]
    decoded = codec.decode_head(np.array([2], np.uint16), gaps, odds, lse)
    assert codec.head_mass(np.array([2]), decoded, lse) == pytest.approx(1.0, abs=1e-6)


@given(hnp.arrays(np.float32, 7, elements=st.floats(-400, 400, width=32)))
def test_numbers_of_a_row_keep_their_bound(values: np.ndarray) -> None:
    assert np.abs(codec.decode_rows(codec.encode_rows(values, np.int32)) - values).max() <= codec.ROW_ERROR
    labels = np.append(-np.abs(values), np.float32(np.nan))
    decoded = codec.decode_labels(codec.encode_labels(labels))
    assert decoded.dtype == np.float32 and np.isnan(decoded[-1])
    assert np.abs(decoded - labels)[:-1].max() <= codec.ROW_ERROR
    with pytest.raises(ValueError, match="outside"):
        codec.encode_rows(np.array([1100.0]), np.uint16)


@given(hnp.arrays(np.float32, 7, elements=st.floats(-80_000, 80_000, width=32)))
def test_logsumexps_at_a_temperature_keep_their_bound(values: np.ndarray) -> None:
    """+-80,000 nats: logits of 4,000 at T = 0.05."""
    codes = codec.encode_rows(values, np.int32, codec.LSE_STEPS)
    decoded = codec.decode_rows(codes, codec.LSE_STEPS)
    assert decoded.dtype == np.float32
    assert (np.abs(decoded.astype(np.float64) - values) <= codec.LSE_ERROR + np.spacing(np.abs(values))).all()


@pytest.mark.parametrize("vocab", [49_152, 262_144])
@pytest.mark.parametrize("k", [1, 50, 512])
def test_kl_of_the_stored_head_is_negligible(vocab: int, k: int) -> None:
    rng = np.random.default_rng(k)
    rows = 8
    full = (rng.standard_normal((rows, vocab)) * 4).astype(np.float32)
    order = np.argsort(-full, axis=1)[:, :k]
    logits = np.take_along_axis(full, order, axis=1).ravel()
    lse = np.log(np.exp(full.astype(np.float64)).sum(axis=1))
    counts = np.full(rows, k, dtype=np.uint16)
    stored = codec.encode_head(counts, logits, lse)
    p = np.exp(logits.reshape(rows, k) - lse[:, None])
    q = np.exp(codec.decode_head(counts, *stored, lse).reshape(rows, k) - lse[:, None])
    # Head and tail together, so that a wrong mass would count.
    p, q = (np.column_stack([x, 1 - x.sum(axis=1)]) for x in (p, q))
    assert np.mean((p * np.log(p / q)).sum(axis=1)) < 2e-4


@pytest.mark.parametrize("vocab", [49_152, 65_536, 65_537, 262_144])
def test_ids_are_small_indexes_into_the_tasks_own_list(vocab: int) -> None:
    one = LogitsFeatures(
        counts=np.array([2, 1], np.uint16),
        ids=np.array([vocab - 1, 0, vocab - 1], np.uint32),
        logits=np.array([1.0, -np.inf, 0.0], np.float32),
        lse=np.array([1.5, 0.0], np.float32),
        label_logprob=np.array([-1.0, np.nan], np.float32),
        entropy=np.array([0.1, 0.0], np.float32),
        tail_ids=np.array([[7, 7, 9], [-1, -1, -1]], np.int32),
    )
    arrays, stats = pack(LogitsSpec(2, tail=3), [one], [2], identity(vocab_size=vocab))
    assert arrays["vocabulary"].itemsize == (2 if vocab <= 65_536 else 4)
    assert arrays["head_index"].dtype == arrays["tail_index"].dtype == np.uint16
    # The last id occurs five times: twice as a head, three times for the row without draws.
    assert arrays["vocabulary"].tolist() == [vocab - 1, 7, 0, 9]
    assert arrays["head_index"].tolist() == [0, 2, 0]
    assert arrays["tail_index"].tolist() == [[1, 0, 2], [0, 0, 0]]
    assert arrays["head_gaps"].tolist() == [0, 65_535, 0] and arrays["head_odds"][1] == codec.CLOSED
    assert stats["entries"] == 3 and stats["labels"] == 1 and stats["distinct_ids"] == 4


def test_draws_inside_the_head_are_refused() -> None:
    task = [sample(3, 4)]
    good = logits(task[0], LogitsSpec(4, tail=2))
    assert good.tail_ids is not None
    for bad, match in (
        (np.where(good.tail_ids >= 0, good.ids.reshape(-1, 4)[:, :1].astype(np.int32), -1), "head"),
        (good.tail_ids[:, ::-1] + np.array([[1, 0]], np.int32), "ascend"),
        (np.full_like(good.tail_ids, 1000), "ascend"),
        (np.array([[-1, 5]] * 4, np.int32), "all of its"),
        (good.tail_ids[:, :1], "2 tail draws"),
        (None, "2 tail draws"),
    ):
        with pytest.raises(ValueError, match=match):
            pack(LogitsSpec(4, tail=2), [replace(good, tail_ids=bad)], [4], identity())


@pytest.mark.parametrize(
    "values", [[np.nan, 0.0], [np.inf, 0.0], [1.0, np.nan], [0.0, 1.0], [-np.inf, -np.inf], [0.0, np.inf]]
)
def test_heads_that_are_no_distribution_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError):
        codec.encode_head(np.array([2], np.uint16), np.array(values, np.float32), np.zeros(1))


@given(heads(), st.integers(1, 60), st.sampled_from([None, 0.1, 0.5, 0.95]))
@settings(max_examples=40, deadline=None)
def test_a_narrower_head_is_the_start_of_each_row(
    head: tuple[np.ndarray, np.ndarray], top_k: int, top_p: float | None
) -> None:
    counts, logits = head
    starts = codec.row_starts(counts)
    rows = list(itertools.pairwise(starts))
    lse = np.array([np.logaddexp.reduce(logits[a:b].astype(np.float64)) + 0.1 for a, b in rows], np.float32)
    keep = codec.narrow_mask(counts, logits, lse, top_k, top_p)
    mass = codec.head_mass(counts, logits, lse)
    for (low, high), row_lse, row_mass in zip(rows, lse, mass, strict=True):
        p = np.exp(logits[low:high].astype(np.float64) - row_lse)
        assert row_mass == pytest.approx(p.sum())
        kept = int(keep[low:high].sum())
        assert keep[low : low + kept].all() and 1 <= kept <= top_k
        if top_p is not None and kept < min(top_k, high - low):
            assert p[:kept].sum() >= top_p - 1e-6
        if top_p is not None:
            assert p[: kept - 1].sum() < top_p + 1e-6


@given(hnp.arrays(np.float32, (3, 5), elements=st.floats(-1e4, 1e4, width=32)))
@settings(max_examples=30, deadline=None)
def test_hidden_states_decode_exactly(values: np.ndarray) -> None:
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    expected = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)
    np.testing.assert_array_equal(codec.decode_hidden(bits, None, "bf16"), expected)
    np.testing.assert_array_equal(codec.decode_hidden(values, None, "f32"), values)
    scale = np.array([0.5, 2.0, 0.25], np.float32)
    codes = np.clip(values, -127, 127).astype(np.int8)
    np.testing.assert_array_equal(codec.decode_hidden(codes, scale, "int8"), codes * scale[:, None])


def test_fp8_table_is_e4m3fn() -> None:
    table = codec.FP8_E4M3FN
    assert table[0x00] == 0 and table[0x01] == 2.0**-9 and table[0x07] == 7 * 2.0**-9
    assert table[0x08] == 2.0**-6 and table[0x38] == 1.0 and table[0x7E] == 448.0 and table[0xFE] == -448.0
    assert np.isnan(table[[0x7F, 0xFF]]).all() and np.isfinite(table).sum() == 254
    torch = pytest.importorskip("torch")
    theirs = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(table, theirs)
