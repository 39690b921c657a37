"""Number codecs: round trips within the documented bounds, at real vocabulary widths."""

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from featurestore import codec
from featurestore.columns import pack
from featurestore.schema import LogitsFeatures, LogitsSpec


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


@given(heads())
@example((np.array([2, 1], np.uint16), np.array([1.0, 8.8914043e-13, 8.8914043e-13], np.float32)))
@settings(max_examples=60, deadline=None)
def test_head_logits_round_trip_within_the_bound_at_every_rank(head: tuple[np.ndarray, np.ndarray]) -> None:
    counts, logits = head
    gaps, top = codec.encode_head(counts, logits)
    assert gaps.dtype == np.uint16 and top.dtype == np.float32
    decoded = codec.decode_head(counts, gaps, top)
    starts = codec.row_starts(counts)[:-1]
    np.testing.assert_array_equal(decoded[starts], logits[starts])
    drop = np.repeat(logits[starts].astype(np.float64), counts) - logits
    exact = drop <= codec.MAX_DROP / codec.STEPS_PER_NAT
    error = np.abs(decoded.astype(np.float64) - logits)
    assert (error[exact] <= codec.LOGIT_ERROR + np.spacing(np.abs(logits[exact])).astype(np.float64)).all()
    # A saturated drop stays far beyond any probability that float64 can hold.
    assert (np.repeat(decoded[starts], counts) - decoded)[~exact].min(initial=3000) > 2000
    assert (np.diff(decoded)[codec._inside(starts, len(decoded))] <= 0).all()


@pytest.mark.parametrize("vocab", [49_152, 262_144])
@pytest.mark.parametrize("k", [1, 50, 512])
def test_kl_of_the_stored_head_is_negligible(vocab: int, k: int) -> None:
    rng = np.random.default_rng(k)
    rows = 8
    full = (rng.standard_normal((rows, vocab)) * 4).astype(np.float32)
    order = np.argsort(-full, axis=1)[:, :k]
    logits = np.take_along_axis(full, order, axis=1).ravel()
    counts = np.full(rows, k, dtype=np.uint16)
    decoded = codec.decode_head(counts, *codec.encode_head(counts, logits)).reshape(rows, k)
    exact = logits.reshape(rows, k).astype(np.float64)
    p = np.exp(exact - exact.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    q = np.exp(decoded - decoded.max(axis=1, keepdims=True).astype(np.float64))
    q /= q.sum(axis=1, keepdims=True)
    assert (p * np.log(p / q)).sum(axis=1).max() < 2e-4


@pytest.mark.parametrize("vocab", [49_152, 65_536, 65_537, 262_144])
def test_ids_take_two_bytes_up_to_a_vocabulary_of_65536(vocab: int) -> None:
    one = LogitsFeatures(
        counts=np.array([2], np.uint16),
        ids=np.array([vocab - 1, 0], np.uint32),
        logits=np.array([1.0, -np.inf], np.float32),
        lse=np.array([1.5], np.float32),
        label_logprob=np.array([np.nan], np.float32),
        entropy=np.array([0.1], np.float32),
    )
    arrays, stats = pack(LogitsSpec(2), [one], [1], vocab, 8)
    assert arrays["head_ids"].itemsize == (2 if vocab <= 65_536 else 4)
    assert arrays["head_ids"].tolist() == [vocab - 1, 0]
    assert arrays["head_gaps"].tolist() == [0, 65_535]
    assert stats["entries"] == 2 and stats["labels"] == 0


@pytest.mark.parametrize(
    "logits", [[np.nan, 0.0], [np.inf, 0.0], [1.0, np.nan], [0.0, 1.0], [-np.inf, -np.inf], [0.0, np.inf]]
)
def test_heads_that_are_no_distribution_are_refused(logits: list[float]) -> None:
    with pytest.raises(ValueError):
        codec.encode_head(np.array([2], np.uint16), np.array(logits, np.float32))


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
