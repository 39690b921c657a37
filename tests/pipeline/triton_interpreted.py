"""The Triton kernel in Triton's interpreter on a CPU, against float64 and against reduce.py.

test_reduce_triton.py runs this file in a process of its own, because TRITON_INTERPRET has to be set before
Triton is imported.

Shapes: N rows, V vocabulary, B blocks, K head size, M tail draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from unittest.mock import patch

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

from pipeline.capture import packing, reduce_triton
from pipeline.capture.reduce import BLOCK, NO_DRAW, LogitRows, lse_at, reduce_logits, weight_plan
from pipeline.capture.reduce_triton import LANES, Scan, reduce_scanned, scan
from pipeline.capture.spec import CaptureSpec

# One rounding of float32; an exponential of NumPy or torch (at most 4 units in the last place, NumPy says).
ROUNDING = 2.0**-24
EXPONENTIAL = 4 * 2 * ROUNDING
# What a weight below float32's normal numbers may be off by, rounded to a subnormal one or to 0.
SUBNORMAL = 2.0**-149
TEMPERATURES = (0.3, 0.5, 2.0, 4.0)
COUNT = 12


def squarings(temperature: float) -> int:
    """How many squarings lie between an exponential and the weights at this temperature."""
    below = [t for t in TEMPERATURES if t < 1]
    done = 0
    for at, more in weight_plan([t for t in TEMPERATURES if t > 1]) + weight_plan([1.0, *below]):
        done = done + more if more else 0
        if at == temperature:
            return done
    raise KeyError(temperature)


def rises(logits_NV: torch.Tensor) -> torch.Tensor:
    """[N]: how often at most a lane of a row meets a higher maximum and scales what it has added up."""
    rows, vocab = logits_NV.shape
    tile = LANES * BLOCK
    padded = torch.nn.functional.pad(logits_NV, (0, -vocab % tile), value=-torch.inf)
    peaks = padded.reshape(rows, -1, LANES, BLOCK).amax(-1).cummax(1).values
    return (peaks[:, 1:] > peaks[:, :-1]).sum(1).amax(-1)


@dataclass(frozen=True)
class Exact:
    """A row's features at one temperature in float64, and what the kernel's may differ by.

    The kernel's roundings, in the order of its sums. A weight is exp2 of a distance to the block's maximum
    (one rounding) times a rounded constant (two), then perhaps squared, which doubles its error each time and
    adds one. It is added to 63 others in some order. What a lane has added up is scaled to a higher maximum
    `rises` times, a block's sum once, a lane's at the end once: an exponential and a product each, where the
    distances are of one sign, so that their roundings never exceed those of one distance from the row's top.
    A lane makes one addition per tile, the row LANES - 1. Sums are of one sign, so that relative errors of
    terms stay such of the sums; errors of distances count by the weights' own means of them.
    """

    lse: torch.Tensor
    entropy: torch.Tensor
    lse_within: torch.Tensor
    entropy_within: torch.Tensor
    weight_error: torch.Tensor

    @classmethod
    def of(cls, logits_NV: torch.Tensor, temperature: float) -> Exact:
        exact = logits_NV.double()
        peak = exact.amax(-1)
        distance = (exact - peak[:, None]) / temperature
        weights = distance.exp()
        norm = weights.sum(-1)
        far = -distance.clamp_min(-1e9)
        mean, square = (weights * far).sum(-1) / norm, (weights * far.square()).sum(-1) / norm
        tiles = math.ceil(exact.shape[1] / (LANES * BLOCK))
        doubled = 2 ** squarings(temperature)
        scaled = (rises(exact) + 2) * (EXPONENTIAL + ROUNDING)
        weight_error = doubled * EXPONENTIAL + (doubled - 1) * ROUNDING + scaled + 3 * ROUNDING * mean
        norm_error = weight_error + (BLOCK - 1 + tiles + LANES - 1) * ROUNDING
        lse, log_norm = torch.logsumexp(exact / temperature, -1), norm.log()
        # The logarithm (two roundings), the temperature, the division of the peak and the last addition.
        log_error = norm_error + 2 * ROUNDING * log_norm
        # The moment: distances weigh more by the second mean. Two additions per tile; a distance, its product
        # with a weight, and the product and the addition that move a sum to another maximum, twice.
        square = 3 * ROUNDING * torch.where(mean > 0, square / mean, 0.0)
        moment_error = weight_error + square + (BLOCK - 1 + 2 * tiles + LANES - 1 + 6) * ROUNDING
        entropy = log_norm + mean
        return cls(
            lse,
            entropy,
            log_error + ROUNDING * (2 * (peak / temperature).abs() + lse.abs()),
            log_error + mean * (moment_error + norm_error + ROUNDING) + ROUNDING * entropy,
            weight_error,
        )


def close(name: str, got: torch.Tensor, want: torch.Tensor, within: torch.Tensor) -> None:
    """Within the bound, where 1 % more is left to products of errors."""
    error = (got.double() - want).abs()
    assert (error <= 1.01 * within).all(), (name, error, within)


def check_logsumexps(logits_NV: torch.Tensor, found: Scan) -> None:
    for temperature, reference in zip(TEMPERATURES, lse_at(logits_NV, TEMPERATURES), strict=True):
        exact = Exact.of(logits_NV, temperature)
        got = found.lse(temperature)
        assert got.dtype == torch.float32
        close(f"lse at T={temperature}", got, exact.lse, exact.lse_within)
        # reduce.py's pairwise sums make no more roundings than the kernel's.
        close(f"lse at T={temperature} against reduce.py", got, reference.double(), 2 * exact.lse_within)


def check_rows(logits_NV: torch.Tensor, labels_N: torch.Tensor, got: LogitRows, reference: LogitRows) -> None:
    exact = Exact.of(logits_NV, 1.0)
    close("lse", got.lse, exact.lse, exact.lse_within)
    close("entropy", got.entropy, exact.entropy, exact.entropy_within)
    close("lse against reduce.py", got.lse, reference.lse.double(), 2 * exact.lse_within)
    # reduce.py takes the mean distance as a dot product, which keeps at least 16 partial sums.
    more = (
        (exact.entropy - exact.lse + logits_NV.double().amax(-1)).abs() * logits_NV.shape[1] / 16 * ROUNDING
    )
    within = 2 * exact.entropy_within + more
    close("entropy against reduce.py", got.entropy, reference.entropy.double(), within)
    assert torch.equal(got.label_logprob.isnan(), labels_N < 0)
    picked = logits_NV.double().gather(-1, labels_N.clamp_min(0)[:, None])[:, 0]
    want = picked - exact.lse
    # A label that is masked out has no probability, on both sides.
    assert torch.equal(got.label_logprob.isneginf(), want.isneginf() & (labels_N >= 0))
    known = (labels_N >= 0) & want.isfinite()
    within = exact.lse_within + ROUNDING * want.abs()
    close("label logprob", got.label_logprob[known], want[known], within[known])
    # Heads are exact. Which of several equal logits are taken is left to the search.
    assert torch.equal(got.head_logits, reference.head_logits)
    ids = got.head_ids.long()
    assert torch.equal(logits_NV.float().gather(-1, ids), got.head_logits)
    assert all(len(set(row)) == ids.shape[1] for row in ids.tolist())
    tied = (got.head_logits[:, 1:] == got.head_logits[:, :-1]).any(-1)
    whole = (logits_NV.float() >= got.head_logits[:, -1:]).sum(-1) > ids.shape[1]
    unique = ~(tied | whole)
    assert torch.equal(got.head_ids[unique], reference.head_ids[unique])


def check_counts(logits_NV: torch.Tensor, got: LogitRows, top_p: float | None) -> None:
    """The head stops at the first rank where float64's mass reaches p, to within the noise of the masses."""
    if top_p is None:
        assert (got.counts == got.head_ids.shape[1]).all()
        return
    exact = Exact.of(logits_NV, 1.0)
    mass = (got.head_logits.double() - exact.lse[:, None]).exp().cumsum(-1)
    within = exact.lse_within + (got.head_ids.shape[1] + 8) * ROUNDING
    for row, count in enumerate(got.counts.tolist()):
        assert count == 1 or mass[row, count - 2] < top_p + within[row]
        assert count == mass.shape[1] or mass[row, count - 1] >= top_p - within[row]


def check_draws(logits_NV: torch.Tensor, shifts_N: torch.Tensor, got: LogitRows) -> None:
    """Each draw is the column in which float64's CDF passes its point, to within float32's noise.

    The CDF is made of blocks' sums of weights of one sign; a point is a share of its last value. Both are off
    by the relative error of a block's sum, and by a rounding to a subnormal number for each column. Draws of
    two reductions that are both right can therefore differ at a border within the noise only.
    """
    assert got.tail_draws is not None
    exact = logits_NV.double()
    tail = (exact - exact.amax(-1, keepdim=True)).exp()
    inside = torch.arange(got.head_ids.shape[1]) < got.counts[:, None]
    tail = tail.scatter(
        -1, got.head_ids.long(), torch.where(inside, 0.0, tail.gather(-1, got.head_ids.long()))
    )
    far = (exact.amax(-1, keepdim=True) - exact).clamp_max(1e9)
    cdf = tail.cumsum(-1)
    total = cdf[:, -1:]
    mean = torch.where(total > 0, (tail * far).sum(-1, keepdim=True) / total, 0.0)
    relative = (BLOCK - 1 + 2 + 3 * mean) * ROUNDING + 3 * EXPONENTIAL
    within = 2 * relative * total + 2 * SUBNORMAL * logits_NV.shape[1]
    points = torch.sort((shifts_N[:, None] + first_points()) % 1.0, dim=-1).values
    ids = got.tail_draws.long()
    none = ids == NO_DRAW
    assert (total.expand_as(ids)[none] <= SUBNORMAL * logits_NV.shape[1]).all()
    ids = ids.clamp_min(0)
    above = cdf.gather(-1, ids) + within
    below = cdf.gather(-1, ids) - tail.gather(-1, ids) - within
    target = points * total
    assert (((below <= target) & (target <= above)) | none).all()
    assert ((tail.gather(-1, ids) > 0) | none).all(), "what the head has, or has no weight, is never drawn"
    assert (got.tail_draws.diff(dim=-1) >= 0).all()


def first_points() -> torch.Tensor:
    """The van der Corput sequence 0, 1/2, 1/4, 3/4 ..., from its definition."""
    return torch.tensor([int(f"{j:08b}"[::-1], 2) / 256 for j in range(COUNT)], dtype=torch.float64)


def check(logits_NV: torch.Tensor, k: int, top_p: float | None, seed: int = 0) -> None:
    """All features of all rows, by the kernel and by reduce.py."""
    rows, vocab = logits_NV.shape
    generator = torch.Generator().manual_seed(seed)
    labels_N = torch.randint(vocab, (rows,), generator=generator)
    labels_N[1:2] = -1
    shifts_N = torch.rand(rows, generator=generator, dtype=torch.float64)
    wanted = {"top_k": min(k, vocab), "top_p": top_p, "tail": COUNT, "shifts_N": shifts_N}
    found = scan(logits_NV, labels_N, TEMPERATURES)
    got = reduce_scanned(logits_NV=logits_NV, labels_N=labels_N, found=found, **wanted)
    reference = reduce_logits(logits_NV=logits_NV, labels_N=labels_N, **wanted)
    check_logsumexps(logits_NV, found)
    check_rows(logits_NV, labels_N, got, reference)
    for features in (got, reference):
        check_counts(logits_NV, features, top_p)
        check_draws(logits_NV, shifts_N, features)


def normal(rows: int, vocab: int, scale: float = 4.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * vocab + 10 * rows + seed)
    return torch.randn(rows, vocab, generator=generator) * scale + 5.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 7])
@pytest.mark.parametrize("vocab", [1, 63, 64, 65, 199, 1003])
def test_small_vocabularies(vocab: int, rows: int, dtype: torch.dtype) -> None:
    check(normal(rows, vocab).to(dtype), k=5, top_p=None if rows == 3 else 0.8, seed=rows)


def test_half_precision() -> None:
    check(normal(2, 199).half(), k=1, top_p=None)


@pytest.mark.parametrize(
    ("vocab", "rows", "k", "dtype"),
    [
        (49_152, 2, 64, torch.bfloat16),
        (49_152, 1, 400, torch.float32),
        (262_144, 1, 64, torch.bfloat16),
        (262_144, 1, 256, torch.float32),
    ],
)
def test_real_vocabularies(vocab: int, rows: int, k: int, dtype: torch.dtype) -> None:
    check(normal(rows, vocab).to(dtype), k=k, top_p=0.9)


TILE = LANES * BLOCK


def adversarial() -> dict[str, torch.Tensor]:
    """Rows of just over two tiles that a careless kernel gets wrong."""
    vocab = 2 * TILE + 77
    spread = normal(1, vocab)[0]
    one_hot = torch.zeros(vocab).index_fill(0, torch.tensor(TILE + 3), 60.0)
    masked = spread.clone()
    masked[: TILE + 100] = -torch.inf  # the whole first tile
    lowest = spread.clone()
    lowest[: TILE + 100] = torch.finfo(torch.float32).min  # as some models mask
    last = torch.full((vocab,), -torch.inf).index_fill(0, torch.tensor(vocab - 1), 3.0)
    subnormal = spread / 8 - 95.0  # exp(-95) is below float32's normal numbers
    subnormal[TILE + 5] = 5.0
    return {
        "one hot": one_hot,
        "all equal": torch.full((vocab,), -7.25),
        "masked": masked,
        "masked by the lowest number": lowest,
        "only the last one": last,
        "magnitudes of 1e4": spread * 2_000.0,
        "shifted by 1e4": spread + 1e4,
        "subnormal weights": subnormal,
        "ascending": torch.linspace(-40.0, 40.0, vocab),
        "descending": torch.linspace(40.0, -40.0, vocab),
    }


@pytest.mark.parametrize("name", adversarial())
def test_adversarial_rows(name: str) -> None:
    check(adversarial()[name][None], k=3, top_p=None)


def test_equal_logits_are_counted_exactly() -> None:
    """Nothing is rounded before the logarithm: a column too many or too few would show."""
    for vocab in (1, 64, 65, TILE - 1, TILE, TILE + 1, 2 * TILE + 77):
        found = scan(torch.full((1, vocab), 1.5), torch.zeros(1, dtype=torch.long), (0.5, 2.0))
        assert (found.norms == vocab).all() and found.moment.item() == 0.0
        assert found.sums.sum().item() == vocab and (found.maxima == 1.5).all()


def test_the_statistics_of_blocks() -> None:
    logits = normal(2, 1003)
    logits[0, 64:128] = -torch.inf
    found = scan(logits, torch.zeros(2, dtype=torch.long), ())
    blocks = torch.nn.functional.pad(logits, (0, -1003 % BLOCK), value=-torch.inf).unflatten(-1, (-1, BLOCK))
    assert torch.equal(found.maxima, blocks.amax(-1)) and torch.equal(found.peak, logits.amax(-1))
    distance = blocks.double() - blocks.double().amax(-1, keepdim=True).clamp_min(-1e30)
    want = distance.exp().sum(-1)
    within = (BLOCK - 1) * ROUNDING + EXPONENTIAL + 3 * ROUNDING * distance.clamp_min(-1e4).abs().amax(-1)
    assert ((found.sums - want).abs() <= within * want).all()
    assert found.sums[0, 1] == 0.0


def test_columns_of_no_token_are_not_looked_at() -> None:
    """The rows of a padded head lie further apart than they are long."""
    padded = torch.full((3, 1024), 1e9)
    padded[:, :1003] = normal(3, 1003)
    labels = torch.tensor([4, 1002, -1])
    views = [
        scan(logits, labels, TEMPERATURES) for logits in (padded[:, :1003], padded[:, :1003].contiguous())
    ]
    for name in ("maxima", "sums", "peak", "moment", "picked", "norms"):
        assert torch.equal(getattr(views[0], name), getattr(views[1], name)), name


def test_rows_that_are_no_distribution_are_not_finite() -> None:
    """As in reduce.py: what reads the features then refuses them."""
    logits = normal(4, TILE + 9)
    logits[1] = -torch.inf
    logits[2, 7] = torch.nan
    logits[3, TILE + 1] = torch.inf
    labels = torch.zeros(4, dtype=torch.long)
    found = scan(logits, labels, TEMPERATURES)
    got = reduce_scanned(logits_NV=logits, labels_N=labels, found=found, top_k=2, top_p=None)
    reference = reduce_logits(logits_NV=logits, labels_N=labels, top_k=2, top_p=None)
    assert got.lse.isfinite().tolist() == reference.lse.isfinite().tolist() == [True, False, False, False]
    assert got.entropy.isfinite().tolist() == reference.entropy.isfinite().tolist()
    for temperature, want in zip(TEMPERATURES, lse_at(logits, TEMPERATURES), strict=True):
        assert found.lse(temperature).isfinite().tolist() == want.isfinite().tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_logit_is_loaded_once(dtype: torch.dtype) -> None:
    """Counted by address, whatever else is computed: 2 bytes per logit of a bf16 teacher."""
    rows, vocab, stride = 2, TILE + 77, TILE + 128
    logits = normal(rows, stride).to(dtype)[:, :vocab]
    loads = np.zeros(rows * stride, dtype=np.int64)
    load = interpreter.InterpreterBuilder.create_masked_load

    def counted(self: object, ptrs: object, mask: object, *others: object) -> object:
        offset = (ptrs.data.astype(np.int64) - logits.data_ptr())[mask.data]  # type: ignore[attr-defined]
        own = (offset >= 0) & (offset < loads.size * logits.element_size())
        np.add.at(loads, offset[own] // logits.element_size(), 1)
        return load(self, ptrs, mask, *others)

    # Builtins of the interpreter call its builder by name.
    with patch.object(interpreter.InterpreterBuilder, "create_masked_load", counted):
        scan(logits, torch.tensor([5, TILE + 3]), TEMPERATURES)
    loads = loads.reshape(rows, stride)
    assert (loads[:, :vocab] == 1).all() and not loads[:, vocab:].any()


@pytest.mark.parametrize(("top_k", "temperatures"), [(5, (0.5, 2.0)), (5, ()), (0, (0.25, 4.0))])
def test_the_fields_are_those_of_a_cpu(top_k: int, temperatures: tuple[float, ...]) -> None:
    spec = CaptureSpec(
        vocab_size=1003,
        top_k=top_k,
        top_p=0.8 if top_k else None,
        tail=COUNT if top_k else 0,
        seed=1,
        temperatures=temperatures,
        layers=(),
        hidden_dtypes=(),
    )
    logits, labels = normal(3, 1003).bfloat16(), torch.tensor([5, -1, 1002])
    shifts = torch.rand(3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    got = packing.fused_fields(spec, logits, labels, shifts)
    want = packing.distribution_fields(spec, logits, labels, shifts)
    assert got.keys() == want.keys()
    for name, field in want.items():
        assert (got[name].dtype, got[name].shape) == (field.dtype, field.shape), name
        torch.testing.assert_close(got[name], field, equal_nan=True)
    packed = packing.RowLayout.of(spec, 1)
    assert packed.pack(got).shape == packed.pack(want).shape


def test_this_is_the_interpreter() -> None:
    assert isinstance(reduce_triton.scan_kernel, interpreter.InterpretedFunction)


def test_its_sample_agrees(caplog: pytest.LogCaptureFixture) -> None:
    assert reduce_triton.agrees(torch.device("cpu")) and not caplog.records


@pytest.mark.parametrize("broken", ["fails", "differs"])
def test_a_kernel_that_does_not_agree_is_not_used(broken: str, caplog: pytest.LogCaptureFixture) -> None:
    """Where Triton finds no compiler, or a GPU computes otherwise."""

    def scanned(logits_NV: torch.Tensor, labels_N: torch.Tensor, temperatures: tuple[float, ...]) -> Scan:
        if broken == "fails":
            raise RuntimeError("Failed to find C compiler")
        return scan(logits_NV + 1e-3, labels_N, temperatures)

    with patch.object(reduce_triton, "scan", scanned):
        assert not reduce_triton.agrees(torch.device("cpu"))
    reason = {"fails": "Failed to find C compiler", "differs": "differ from those of torch"}[broken]
    assert reason in caplog.text
