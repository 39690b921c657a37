"""What a sidecar's weights mean, in float64, each number with a bound on what float32 makes of it.

u is float32's unit roundoff; a sum of n products in any order is within n u / (1 - n u) of the sum of their
magnitudes. Bounds are first order and multiplied by SLACK for the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from featurestore.format.sidecar import BlockSpec, HeadSpec, Part

Array = npt.NDArray[np.float64]
U = 2.0**-24
SLACK = 1.05


@dataclass
class Bounded:
    """values, and how far float32 may be from them."""

    values: Array
    error: Array

    def check(self, found: npt.NDArray[np.float32]) -> None:
        off = np.abs(found.astype(np.float64) - self.values) / (SLACK * self.error + 1e-30)
        assert off.max() <= 1, f"{off.max()} times the bound"
        # A bound of the size of the numbers would prove nothing.
        assert np.median(self.error) < 1e-3 * np.abs(self.values).mean()


def weight(part: Part[HeadSpec] | Part[BlockSpec], name: str) -> Array | None:
    tensor = part.tensors.get(name)
    return None if tensor is None else tensor.to_float32().astype(np.float64)


def matmul(x: Bounded, weights: Array) -> Bounded:
    n = x.values.shape[-1]
    rounding = n * U / (1 - n * U) * (np.abs(x.values) @ np.abs(weights).T)
    return Bounded(x.values @ weights.T, rounding + x.error @ np.abs(weights).T)


def linear(x: Bounded, weights: Array, bias: Array | None) -> Bounded:
    out = matmul(x, weights)
    if bias is None:
        return out
    values = out.values + bias
    return Bounded(values, out.error + U * np.abs(values))


def rms_norm(x: Bounded, weights: Array, eps: float) -> Bounded:
    """1 / sqrt(mean + eps) moves, relatively, by at most |error| / |x| and half the rounding of the mean."""
    n = x.values.shape[-1]
    factor = 1 / np.sqrt((x.values**2).mean(-1, keepdims=True) + eps)
    moved = np.linalg.norm(x.error, axis=-1, keepdims=True) / np.linalg.norm(x.values, axis=-1, keepdims=True)
    values = x.values * factor * weights
    return Bounded(values, np.abs(factor * weights) * x.error + np.abs(values) * (moved + (n / 2 + 8) * U))


def logits(head: Part[HeadSpec], final: npt.NDArray[np.float32]) -> Bounded:
    """The logits [T, V] of the state behind the final norm."""
    spec, weights = head.spec, weight(head, "weight")
    assert weights is not None
    out = linear(exact(final), weights, weight(head, "bias"))
    out = scaled(out, spec.logit_scale)
    return out if spec.logit_softcap is None else softcapped(out, spec.logit_softcap)


def projections(block: Part[BlockSpec], state: npt.NDArray[np.float32]) -> dict[str, Bounded]:
    """Q [T, H, d], K and V [T, G, d] before rope, of the state that enters the block."""
    spec, norm = block.spec, weight(block, "input_norm.weight")
    assert norm is not None
    x = rms_norm(exact(state), norm, spec.norm_eps)
    found = {}
    for name in ("q", "k", "v"):
        weights = weight(block, f"{name}.weight")
        assert weights is not None
        flat = linear(x, weights, weight(block, f"{name}.bias"))
        shape = (len(state), -1, spec.head_dim)
        heads = Bounded(flat.values.reshape(shape), flat.error.reshape(shape))
        inner = weight(block, f"{name}_norm.weight")
        found[name] = heads if inner is None else rms_norm(heads, inner, spec.norm_eps)
    return found


def attention(block: Part[BlockSpec], state: npt.NDArray[np.float32]) -> Bounded:
    """The attention map [H, T, T] of the block, for rope of the default type."""
    spec, found = block.spec, projections(block, state)
    q, k = (rotate(spec, found[name]) for name in ("q", "k"))
    group = spec.heads // spec.kv_heads
    rows = []
    for head in range(spec.heads):
        one = Bounded(q.values[:, head], q.error[:, head])
        other, moved = k.values[:, head // group], k.error[:, head // group]
        scores = matmul(one, other)
        scores.error += np.abs(one.values) @ moved.T
        scores = scaled(scores, spec.attention_scale)
        if spec.attention_softcap is not None:
            scores = softcapped(scores, spec.attention_softcap)
        rows.append(masked_softmax(scores, spec.window))
    return Bounded(np.stack([row.values for row in rows]), np.stack([row.error for row in rows]))


def rotate(spec: BlockSpec, x: Bounded) -> Bounded:
    """Rotary embedding of the first part of each head, halves against each other."""
    if spec.rope is None:
        return x
    assert spec.rope["rope_type"] == "default"
    width = int(spec.head_dim * spec.rope.get("partial_rotary_factor", 1.0))
    half, length = width // 2, len(x.values)
    angles = np.arange(length)[:, None] * spec.rope["rope_theta"] ** (-np.arange(half) / half)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    # Angles grow to T, and pow, product, cosine and the two products round a few times each.
    slip = (6 * length + 6) * U

    def turn(values: Array, sign: float) -> Array:
        one, other = values[..., :half], values[..., half:width]
        return np.concatenate([one * cos + sign * other * sin, other * cos - sign * one * sin], -1)

    both = np.abs(x.values[..., :half]) + np.abs(x.values[..., half:width])
    moved = x.error[..., :half] + x.error[..., half:width]
    error = np.concatenate([moved + slip * both] * 2, -1)
    return Bounded(
        np.concatenate([turn(x.values, -1.0), x.values[..., width:]], -1),
        np.concatenate([error, x.error[..., width:]], -1),
    )


def masked_softmax(scores: Bounded, window: int | None) -> Bounded:
    """A score that is off by e moves every probability by a factor of exp(2 e) at most."""
    length = len(scores.values)
    distance = np.arange(length)[:, None] - np.arange(length)
    seen = (distance >= 0) & (distance < (window or length))
    values = np.where(seen, scores.values, -np.inf)
    odds = np.exp(values - values.max(-1, keepdims=True))
    p = odds / odds.sum(-1, keepdims=True)
    # exp of a difference of size s rounds by about (s + 2) u, the sum by T u.
    spread = np.where(seen, np.abs(scores.values), 0).max(-1, keepdims=True)
    worst = np.where(seen, scores.error, 0).max(-1, keepdims=True)
    return Bounded(p, p * (np.expm1(2 * worst) + (2 * spread + length + 8) * U))


def exact(values: npt.NDArray[np.float32]) -> Bounded:
    return Bounded(values.astype(np.float64), np.zeros(values.shape))


def scaled(x: Bounded, factor: float) -> Bounded:
    values = x.values * factor
    return Bounded(values, x.error * abs(factor) + 2 * U * np.abs(values))


def softcapped(x: Bounded, cap: float) -> Bounded:
    """tanh is 1-Lipschitz; a division, tanh and a product round."""
    values = cap * np.tanh(x.values / cap)
    return Bounded(values, x.error + 4 * U * np.abs(x.values))
