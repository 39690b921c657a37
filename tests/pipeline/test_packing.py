"""Packed rows: what one side packs, the other unpacks, for every combination of fields."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featurestore.format.schema import HiddenSpec, LogitsSpec, LseSpec
from featurestore.format.states.rotated import ROTATED, decode_rotated
from pipeline.capture.packing import RowLayout, distribution_fields, hidden_fields, to_features
from pipeline.capture.reduce import encode_hidden, lse_at, reduce_logits
from pipeline.capture.spec import CaptureSpec

VOCAB, WIDTH = 53, 6


@settings(deadline=None, max_examples=50)
@given(
    rows=st.integers(1, 9),
    top_k=st.integers(0, VOCAB),
    top_p=st.none() | st.floats(0.1, 0.99),
    tail=st.integers(0, 5),
    temperatures=st.lists(st.sampled_from([0.05, 0.5, 2.0, 99.999]), unique=True, max_size=3),
    layers=st.lists(st.integers(0, 9), unique=True, max_size=3),
    dtype=st.sampled_from(["bf16", "f32", "int8", "fp8", "int4", "int2"]),
)
def test_round_trip(
    rows: int,
    top_k: int,
    top_p: float | None,
    tail: int,
    temperatures: list[float],
    layers: list[int],
    dtype: str,
) -> None:
    hidden = [HiddenSpec(layer, dtype) for layer in layers]
    lse = [LseSpec(temperature) for temperature in temperatures]
    groups = (*([LogitsSpec(top_k, top_p, tail, seed=min(tail, 1))] if top_k else []), *hidden, *lse)
    if not groups:
        return
    spec = CaptureSpec.from_groups(groups, VOCAB)
    assert CaptureSpec.from_json(spec.to_json()) == spec
    layout = RowLayout.of(spec, WIDTH)
    logits = torch.randn(rows, VOCAB)
    streams = {layer: torch.randn(rows, WIDTH) for layer in layers}
    labels, shifts = torch.full((rows,), -1), torch.rand(rows).double()
    fields = distribution_fields(spec, logits, labels, shifts)
    for layer, stream in streams.items():
        fields |= hidden_fields(layer, stream, dtype)

    packed = layout.pack(fields)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, layout.size)
    features = to_features(layout.unpack(packed.numpy()), groups, WIDTH)

    assert set(features) == set(groups)
    exact = lse_at(logits, spec.temperatures)
    for group in lse:
        want = exact[spec.temperatures.index(group.temperature)]
        np.testing.assert_array_equal(features[group].lse, want.numpy())
    if top_k:
        reduced = reduce_logits(
            logits_NV=logits, labels_N=labels, top_k=top_k, top_p=top_p, tail=tail, shifts_N=shifts
        )
        got = features[groups[0]]
        got.check(rows)
        assert got.counts.tolist() == reduced.counts.tolist()
        start = 0
        for row, count in enumerate(got.counts.tolist()):
            assert got.ids[start : start + count].tolist() == reduced.head_ids[row, :count].tolist()
            np.testing.assert_array_equal(got.logits[start : start + count], reduced.head_logits[row, :count])
            start += count
        np.testing.assert_array_equal(got.lse, reduced.lse.numpy())
        assert (got.tail_ids is None) == (tail == 0)
        if tail:
            np.testing.assert_array_equal(got.tail_ids, reduced.tail_draws.numpy())
    for group in hidden:
        features[group].check(rows, WIDTH)
        coded = encode_hidden(streams[group.layer], dtype)
        want = coded.values.float()
        want = want if coded.scale is None else want * coded.scale[:, None]
        found = features[group].to_float32()
        stored = decode_rotated(coded.values.numpy(), dtype, WIDTH) if dtype in ROTATED else want.numpy()
        np.testing.assert_array_equal(found, stored)
        error = np.square(found.astype(np.float64) - streams[group.layer].numpy()).sum(-1)
        np.testing.assert_allclose(features[group].squared_error, error, rtol=1e-5)


def test_one_pass_takes_one_distribution_and_each_layer_once() -> None:
    with pytest.raises(ValueError, match="one distribution"):
        CaptureSpec.from_groups((LogitsSpec(4), LogitsSpec(8)), VOCAB)
    with pytest.raises(ValueError, match="each hidden layer once"):
        CaptureSpec.from_groups((HiddenSpec(1, "bf16"), HiddenSpec(1, "int8")), VOCAB)
    with pytest.raises(ValueError, match="each temperature"):
        CaptureSpec.from_groups((LseSpec(2), LseSpec(2.0)), VOCAB)
