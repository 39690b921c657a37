"""The reduction of logits and hidden states, against float64 references."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featurestore.format.tail import first_draws, row_shifts
from pipeline.capture.reduce import NO_DRAW, encode_hidden, head_counts, lse_at, reduce_logits, top

F32 = float(np.finfo(np.float32).eps)


def reference(logits: torch.Tensor, labels: torch.Tensor, k: int) -> dict[str, torch.Tensor]:
    exact = logits.double()
    logprobs = torch.log_softmax(exact, -1)
    top = torch.topk(exact, k, dim=-1)
    return {
        "head_logits": top.values,
        "lse": torch.logsumexp(exact, -1),
        "entropy": -(logprobs.exp() * logprobs).sum(-1),
        "label_logprob": logprobs.gather(-1, labels[:, None])[:, 0],
    }


@pytest.mark.parametrize(("rows", "vocab", "k"), [(3, 49_152, 64), (2, 262_144, 256), (5, 7, 7), (1, 1, 1)])
@pytest.mark.parametrize("scale", [0.01, 4.0, 30.0])
def test_reduction_matches_float64(rows: int, vocab: int, k: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(rows * vocab)
    logits = torch.randn(rows, vocab, generator=generator) * scale + 5.0
    labels = torch.randint(vocab, (rows,), generator=generator)
    got, want = reduce_logits(logits, labels, k, None), reference(logits, labels, k)
    assert torch.equal(got.head_logits.double(), want["head_logits"])
    assert torch.equal(logits.gather(-1, got.head_ids.long()), got.head_logits)
    # A pairwise float32 sum of V positive terms is off by at most log2(V) + 8 roundings relative (torch sums
    # blocks of a vector width first), the exponentials by two more; logits enter with their own magnitude.
    magnitude = float(logits.abs().max())
    bound = F32 * (np.log2(vocab) + 12) * (1.0 + 3 * magnitude)
    for name in ("lse", "label_logprob", "entropy"):
        assert (getattr(got, name).double() - want[name]).abs().max() <= bound, name


@pytest.mark.parametrize("temperature", [0.05, 0.5, 2.0, 100.0])
@pytest.mark.parametrize("vocab", [1, 7, 49_152, 262_144])
@pytest.mark.parametrize(("scale", "shift"), [(0.01, 0.0), (4.0, 5.0), (30.0, -2_000.0), (1.0, 30_000.0)])
def test_logsumexp_at_a_temperature_matches_float64(
    temperature: float, vocab: int, scale: float, shift: float
) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(3, vocab, generator=generator) * scale + shift
    logits[0, 1:] = -torch.inf
    want = torch.logsumexp(logits.double() / temperature, -1)
    (got,) = lse_at(logits, [temperature])
    assert got.dtype == torch.float32 and got.isfinite().all()
    # A sum of V positive terms (as above); distances to the top of up to 88 T count, each rounded twice; then
    # the peak's own division and the last addition.
    bound = F32 * (np.log2(vocab) + 12 + 2 * 88 + 2 * want.abs())
    assert ((got.double() - want).abs() <= bound).all()
    rounded = logits.bfloat16()
    assert torch.equal(lse_at(rounded, [temperature])[0], lse_at(rounded.float(), [temperature])[0])


@pytest.mark.parametrize(
    "temperatures",
    [(0.5, 2.0, 4.0), (4.0, 0.25, 1.5, 0.75), (8.0, 0.5, 0.25), (100.0, 50.0, 25.0, 12.5, 6.25)],
)
@pytest.mark.parametrize(("scale", "shift"), [(4.0, 5.0), (30.0, -2_000.0)])
def test_several_temperatures_share_their_exponentials(
    temperatures: tuple[float, ...], scale: float, shift: float
) -> None:
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(3, 49_153, generator=generator) * scale + shift
    for temperature, got in zip(temperatures, lse_at(logits, temperatures), strict=True):
        want = torch.logsumexp(logits.double() / temperature, -1)
        # As for one temperature; three squarings make 8 of an exponential's 2 roundings and add 4 + 2 + 1.
        bound = F32 * (np.log2(49_153) + 12 + 2 * 8 + 7 + 2 * 88 + 2 * want.abs())
        assert ((got.double() - want).abs() <= bound).all(), temperature


def test_masked_tokens_have_no_mass_and_break_nothing() -> None:
    """A teacher may give -inf to tokens that it never says."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5_000, generator=generator)
    masked = logits.clone()
    masked[:, 700:] = -torch.inf
    shifts = torch.rand(3, generator=generator, dtype=torch.float64)
    labels = torch.tensor([5, 6, 7])
    got = reduce_logits(logits_NV=masked, labels_N=labels, top_k=64, top_p=0.5, tail=16, shifts_N=shifts)
    want = reduce_logits(
        logits_NV=logits[:, :700].contiguous(), labels_N=labels, top_k=64, top_p=0.5, tail=16, shifts_N=shifts
    )
    for name in ("counts", "head_ids", "tail_draws"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    for name in ("lse", "entropy", "label_logprob"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name))


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    k=st.integers(1, 70),
    vocab=st.sampled_from([64, 199, 4_097, 8_192]),
    levels=st.sampled_from([3, 1_000_000]),
)
def test_the_top_by_blocks_is_the_top(seed: int, k: int, vocab: int, levels: int) -> None:
    """Also where many logits tie, as those of bf16 teachers do: then any of the tied columns will do."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.rand(3, vocab, generator=generator) * levels).round()
    k = min(k, vocab)
    values, columns = top(logits, k)
    assert torch.equal(values, torch.topk(logits, k).values)
    assert torch.equal(logits.gather(-1, columns), values)
    assert all(len(set(row)) == k for row in columns.tolist())


def test_a_row_without_label_is_nan_and_others_are_not() -> None:
    rows = reduce_logits(torch.randn(3, 11), torch.tensor([4, -1, 0]), 2, None)
    assert torch.isnan(rows.label_logprob).tolist() == [False, True, False]


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10_000), top_p=st.floats(0.01, 1.0), k=st.integers(1, 40))
def test_adaptive_head_is_the_smallest_that_reaches_p(seed: int, top_p: float, k: int) -> None:
    logits = torch.randn(4, 41, generator=torch.Generator().manual_seed(seed)).mul(3)
    rows = reduce_logits(logits, torch.zeros(4, dtype=torch.long), k, top_p)
    mass = torch.softmax(logits.double(), -1).sort(-1, descending=True).values.cumsum(-1)
    for row, count in enumerate(rows.counts.tolist()):
        assert 1 <= count <= k
        if count < k:
            assert mass[row, count - 1] >= top_p - 1e-5
        if count > 1:
            assert mass[row, count - 2] < top_p + 1e-5


def test_without_top_p_every_head_is_full() -> None:
    assert head_counts(torch.zeros(3, 5), torch.zeros(3), None).tolist() == [5, 5, 5]


@pytest.mark.parametrize("shape", [(3, 1), (17, 576), (2, 4097)])
def test_hidden_encodings_stay_within_their_bounds(shape: tuple[int, int]) -> None:
    hidden = (
        torch.randn(shape, generator=torch.Generator().manual_seed(1))
        * torch.logspace(-3, 3, shape[0])[:, None]
    )
    hidden[0] = 0.0
    exact, scale_of_row = hidden.double(), hidden.abs().amax(-1, keepdim=True).double()

    bf16 = encode_hidden(hidden, "bf16")
    assert bf16.scale is None
    assert ((bf16.values.double() - exact).abs() <= 2.0**-8 * exact.abs()).all()

    int8 = encode_hidden(hidden, "int8")
    assert int8.scale is not None
    decoded = int8.values.double() * int8.scale[:, None].double()
    assert ((decoded - exact).abs() <= scale_of_row / 127 * (0.5 + 64 * F32)).all()

    fp8 = encode_hidden(hidden, "fp8")
    assert fp8.scale is not None
    decoded = fp8.values.float().double() * fp8.scale[:, None].double()
    allowed = torch.maximum(exact.abs() * 2.0**-4, scale_of_row / 448 * 2.0**-10) * (1 + 64 * F32)
    assert ((decoded - exact).abs() <= allowed).all()

    f32 = encode_hidden(hidden, "f32")
    assert f32.scale is None
    assert torch.equal(f32.values, hidden)


@pytest.mark.parametrize("dtype", ["bf16", "f32", "int8", "fp8"])
def test_the_error_of_an_encoding_is_measured(dtype: str) -> None:
    hidden = (
        torch.randn(9, 577, generator=torch.Generator().manual_seed(2)) * torch.logspace(-3, 4, 9)[:, None]
    )
    hidden[4] = 0.0
    rows = encode_hidden(hidden, dtype)
    stored = (
        rows.values.double()
        if rows.scale is None
        else rows.values.float().double() * rows.scale[:, None].double()
    )
    # A difference of float32 numbers carries one rounding of the stored one: 2**-24 of the element.
    error, norm = (stored - hidden.double()).square().sum(-1), hidden.double().square().sum(-1)
    assert rows.squared_error.dtype == rows.squared_norm.dtype == torch.float32
    assert ((rows.squared_norm - norm).abs() <= 32 * F32 * norm).all()
    rounding = 2 * F32 * (error * norm).sqrt() + (F32**2) * norm
    assert ((rows.squared_error - error).abs() <= 32 * F32 * error + rounding).all()
    assert bool(rows.squared_error.any()) == (dtype != "f32")
    given = hidden.bfloat16()
    assert not encode_hidden(given, "bf16").squared_error.any(), "against what the worker had"


def test_unknown_hidden_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="int3"):
        encode_hidden(torch.zeros(1, 1), "int3")


@pytest.mark.parametrize(
    ("vocab", "k", "count"), [(49_152, 8, 16), (262_144, 16, 12), (1003, 5, 7), (300, 40, 3)]
)
def test_tail_draws_follow_the_distribution_outside_the_head(vocab: int, k: int, count: int) -> None:
    """Over a grid of G shifts a token is drawn G * M * p times, to within one draw per point and border."""
    generator = torch.Generator().manual_seed(vocab)
    row = torch.randn(vocab, generator=generator) * 4
    grid = 256
    shifts = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    rows = reduce_logits(
        logits_NV=row.expand(grid, -1),
        labels_N=torch.zeros(grid, dtype=torch.long),
        top_k=k,
        top_p=None,
        tail=count,
        shifts_N=shifts,
    )
    assert rows.tail_draws is not None and rows.tail_draws.shape == (grid, count)
    p = torch.softmax(row.double(), -1)
    p[rows.head_ids[0].long()] = 0.0
    wanted = p / p.sum() * grid * count
    found = torch.bincount(rows.tail_draws.flatten().long(), minlength=vocab)
    assert not found[rows.head_ids[0].long()].any()
    assert (found - wanted).abs().max() <= count + 1e-3
    # The sum over any set of neighbours is as even: no mass is lost in the deep tail.
    assert (found.cumsum(0) - wanted.cumsum(0)).abs().max() <= count + 1e-2
    assert (rows.tail_draws.diff(dim=-1) >= 0).all()


def test_draws_do_not_depend_on_the_batch_and_fewer_are_the_first_ones() -> None:
    logits = torch.randn(9, 700, generator=torch.Generator().manual_seed(3)) * 3
    tokens = np.arange(9, dtype=np.int32)
    shifts = torch.from_numpy(row_shifts(tokens, 0, 9, 5))
    labels = torch.zeros(9, dtype=torch.long)
    whole = reduce_logits(
        logits_NV=logits, labels_N=labels, top_k=10, top_p=0.7, tail=50, shifts_N=shifts
    ).tail_draws
    parts = [
        reduce_logits(
            logits_NV=logits[i : i + 1],
            labels_N=labels[:1],
            top_k=10,
            top_p=0.7,
            tail=50,
            shifts_N=shifts[i : i + 1],
        )
        for i in range(9)
    ]
    assert whole is not None and torch.equal(whole, torch.cat([part.tail_draws for part in parts]))
    few = reduce_logits(
        logits_NV=logits, labels_N=labels, top_k=10, top_p=0.7, tail=12, shifts_N=shifts
    ).tail_draws
    assert few is not None
    kept = whole.numpy()[first_draws(shifts.numpy(), 50, 12)].reshape(9, 12)
    np.testing.assert_array_equal(kept, few.numpy())


def test_a_row_without_tail_has_no_draws() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0], [0.0, -torch.inf, 2.0]])
    shifts = torch.tensor([0.1, 0.999999999], dtype=torch.float64)
    full = reduce_logits(
        logits_NV=logits, labels_N=torch.tensor([0, 0]), top_k=3, top_p=None, tail=4, shifts_N=shifts
    ).tail_draws
    assert full is not None and (full == NO_DRAW).all()
    one = reduce_logits(
        logits_NV=logits, labels_N=torch.tensor([0, 0]), top_k=1, top_p=None, tail=4, shifts_N=shifts
    ).tail_draws
    assert one is not None and set(one[1].tolist()) == {0}, "a token of weight zero is never drawn"
