"""Random but valid samples and features for the store's tests."""

from __future__ import annotations

import numpy as np

from featurestore.format.codec import LOGPROB_ERROR, LSE_ERROR, ROW_ERROR
from featurestore.format.plan import Task
from featurestore.format.schema import (
    NO_DRAW,
    GroupFeatures,
    GroupSpec,
    HiddenFeatures,
    HiddenSpec,
    LogitsFeatures,
    LogitsSpec,
    LseFeatures,
    LseSpec,
    Sample,
    TeacherIdentity,
)
from featurestore.format.states.rotated import ROTATED, RotatedLayout

VOCAB, HIDDEN, LAYERS = 1000, 16, 4


def identity(**changes: object) -> TeacherIdentity:
    fields: dict[str, object] = {
        "name": "tiny",
        "architecture": "LlamaForCausalLM",
        "digest": "ab" * 16,
        "tokenizer_digest": "cd" * 16,
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_layers": LAYERS,
        "max_position": 2048,
        "engine": "transformers",
        "engine_version": "5.0",
        "dtype": "float32",
        "quantization": "none",
    }
    return TeacherIdentity(**{**fields, **changes})


def sample(seed: int, length: int | None = None, vocab: int = VOCAB) -> Sample:
    rng = np.random.default_rng(seed)
    length = int(rng.integers(1, 40)) if length is None else length
    tokens = rng.integers(0, vocab, length, dtype=np.int32)
    return Sample(tokens=tokens, loss_mask=rng.random(length) < 0.8)


def task_of(samples: list[Sample]) -> Task:
    return Task(tuple(s.id for s in samples), tuple(len(s) for s in samples))


def logits(one: Sample, spec: LogitsSpec, vocab: int = VOCAB) -> LogitsFeatures:
    """A real top-k of random full rows, so that lse, label_logprob and entropy are consistent."""
    seed = int(one.id[:8], 16)
    rng = np.random.default_rng(seed)
    full = (rng.standard_normal((len(one), vocab)) * 3).astype(np.float32)
    top = full.max(axis=1, keepdims=True)
    lse = (top[:, 0] + np.log(np.exp(full - top).sum(axis=1))).astype(np.float32)
    k = min(spec.top_k, vocab)
    order = np.argsort(-full, axis=1, kind="stable")[:, :k]
    head = np.take_along_axis(full, order, axis=1)
    keep = np.ones_like(head, dtype=bool)
    if spec.top_p is not None:
        p = np.exp(head - lse[:, None])
        keep = (np.cumsum(p, axis=1) - p) < spec.top_p
    logprob = full - lse[:, None]
    tail = draws(np.exp(logprob), order, keep, spec) if spec.tail else None
    label = np.full(len(one), np.nan, dtype=np.float32)
    label[:-1] = logprob[np.arange(len(one) - 1), one.tokens[1:]]
    return LogitsFeatures(
        counts=keep.sum(axis=1).astype(np.uint16),
        ids=order[keep].astype(np.uint32),
        logits=head[keep],
        lse=lse,
        label_logprob=label,
        entropy=(-(np.exp(logprob) * logprob).sum(axis=1)).astype(np.float32),
        tail_ids=tail,
    )


def draws(p: np.ndarray, order: np.ndarray, keep: np.ndarray, spec: LogitsSpec) -> np.ndarray:
    """Any ids outside each row's head, ascending; every fifth row has no tail."""
    outside = p.copy()
    for row in range(len(p)):
        outside[row, order[row][keep[row]]] = 0.0
    points = (np.arange(spec.tail) + 0.5) / spec.tail
    found = [np.searchsorted(c / c[-1], points, side="right") for c in outside.cumsum(axis=1)]
    tail = np.array(found, dtype=np.int32).reshape(len(p), spec.tail)
    tail[::5] = NO_DRAW
    return tail


def hidden(one: Sample, spec: HiddenSpec, size: int = HIDDEN) -> HiddenFeatures:
    rng = np.random.default_rng(int(one.id[:8], 16) + spec.layer)
    shape = (len(one), size)
    scale = rng.random(len(one), dtype=np.float32) + 0.1
    if spec.dtype == "f32":
        return HiddenFeatures(rng.standard_normal(shape, dtype=np.float32), None, "f32")
    if spec.dtype == "bf16":
        bits = rng.standard_normal(shape, dtype=np.float32).view(np.uint32) >> 16
        return HiddenFeatures(bits.astype(np.uint16), None, "bf16")
    if spec.dtype == "int8":
        return HiddenFeatures(rng.integers(-127, 128, shape, dtype=np.int8), scale, "int8")
    if spec.dtype in ROTATED:
        layout = RotatedLayout(spec.dtype, size)
        # Any bytes are codes; of scales and outliers that are not too large for float32.
        rows = rng.integers(0, 256, (len(one), layout.row_bytes), dtype=np.uint8)
        rows[:, layout.ends[0] + 1 :: 2] &= 0x41
        start, stop = layout.ends[1:3]
        columns = rng.integers(0, size, (len(one), (stop - start) // 2))
        rows[:, start:stop] = columns.astype("<u2").view(np.uint8)
        return HiddenFeatures(rows, None, spec.dtype, hidden_size=size)
    return HiddenFeatures(rng.integers(0, 120, shape, dtype=np.uint8), scale, "fp8")


def lse(one: Sample, spec: LseSpec) -> LseFeatures:
    rng = np.random.default_rng(int(one.id[:8], 16))
    return LseFeatures((rng.standard_normal(len(one)) * 30 / spec.temperature).astype(np.float32))


def features(samples: list[Sample], specs: list[GroupSpec]) -> dict[GroupSpec, list[GroupFeatures]]:
    return {spec: [feature(s, spec) for s in samples] for spec in specs}


def feature(one: Sample, spec: GroupSpec) -> GroupFeatures:
    if isinstance(spec, LogitsSpec):
        return logits(one, spec)
    return lse(one, spec) if isinstance(spec, LseSpec) else hidden(one, spec)


def assert_same(found: GroupFeatures, given: GroupFeatures) -> None:
    """Ids and hidden states equal to the last bit, numbers of a row within the documented bounds."""
    if isinstance(given, HiddenFeatures):
        assert isinstance(found, HiddenFeatures) and found.dtype == given.dtype
        np.testing.assert_array_equal(found.values, given.values)
        assert (found.scale is None) == (given.scale is None)
        if given.scale is not None:
            np.testing.assert_array_equal(found.scale, given.scale)
        return
    if isinstance(given, LseFeatures):
        assert isinstance(found, LseFeatures)
        np.testing.assert_allclose(found.lse, given.lse, rtol=1e-6, atol=LSE_ERROR)
        return
    assert isinstance(found, LogitsFeatures)
    found.check(len(given.counts))
    for name in ("counts", "ids", "tail_ids"):
        np.testing.assert_array_equal(getattr(found, name), getattr(given, name), err_msg=name)
    for name in ("lse", "label_logprob", "entropy"):
        np.testing.assert_allclose(getattr(found, name), getattr(given, name), rtol=1e-6, atol=ROW_ERROR)
    logprobs = [one.logits - np.repeat(one.lse, one.counts) for one in (found, given)]
    np.testing.assert_allclose(*logprobs, rtol=1e-6, atol=LOGPROB_ERROR + 1e-5)
