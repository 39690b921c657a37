"""Reduce teacher outputs to features: the numerics that both engines share.

Shapes: N rows (positions of a chunk), V vocabulary, K head size, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

INT8_MAX = 127.0
FP8_MAX = 448.0  # largest finite float8_e4m3fn


@dataclass(frozen=True)
class LogitRows:
    """Reduced logits of N rows; all tensors on the device of the logits.

    counts int32 [N]: head size of each row, 1..K; head_ids int32 [N, K] and head_logits float32 [N, K],
    descending, meaningful up to `counts`; lse, label_logprob, entropy float32 [N] (nats).
    """

    counts: torch.Tensor
    head_ids: torch.Tensor
    head_logits: torch.Tensor
    lse: torch.Tensor
    label_logprob: torch.Tensor
    entropy: torch.Tensor


def reduce_logits(
    logits_NV: torch.Tensor, labels_N: torch.Tensor, top_k: int, top_p: float | None
) -> LogitRows:
    """Top-k head, logsumexp, label log-probability and entropy of each row.

    Args:
        logits_NV: raw logits, any float dtype; computed in float32.
        labels_N: int64 id of the token that follows each row; negative where there is none.
        top_k: K, 1..V: the head size, or its cap when `top_p` is given.
        top_p: stop the head at the first rank where its cumulative mass reaches p (nucleus, Holtzman 2020).
    """
    logits = logits_NV.float()
    head_logits, head_ids = torch.topk(logits, top_k, dim=-1)
    peak = head_logits[:, :1]
    # One exponential pass serves both the normaliser and the entropy H = lse - E[logit].
    weights = torch.exp(logits - peak)
    norm = weights.sum(-1)
    expected = torch.linalg.vecdot(weights, logits) / norm
    lse = peak[:, 0] + norm.log()
    # bf16 teachers tie often and sums round: a one-token distribution may come out at -1e-7.
    entropy = (lse - expected).clamp_min(0.0)
    picked = logits.gather(-1, labels_N.clamp_min(0)[:, None])[:, 0] - lse
    label_logprob = torch.where(labels_N >= 0, picked, torch.full_like(picked, torch.nan))
    return LogitRows(
        counts=head_counts(head_logits, lse, top_p),
        head_ids=head_ids.int(),
        head_logits=head_logits,
        lse=lse,
        label_logprob=label_logprob,
        entropy=entropy,
    )


def head_counts(head_logits_NK: torch.Tensor, lse_N: torch.Tensor, top_p: float | None) -> torch.Tensor:
    """int32 [N]: how many ranks of each row to keep; K for all rows when `top_p` is None."""
    rows, k = head_logits_NK.shape
    if top_p is None:
        return torch.full((rows,), k, dtype=torch.int32, device=head_logits_NK.device)
    mass_before = torch.cumsum(torch.exp(head_logits_NK - lse_N[:, None]), dim=-1)[:, :-1]
    return 1 + (mass_before < top_p).sum(-1, dtype=torch.int32)


def encode_hidden(hidden_ND: torch.Tensor, dtype: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Hidden states in their stored type, with a float32 scale [N] for the scaled ones.

    `bf16` and `f32` are plain casts. `int8` and `fp8` (e4m3fn) divide each row by its absolute maximum over
    the type's range: int8 is then within scale/2 per element, fp8 within 1/16 relative (or within
    scale * 2**-10 near 0).

    Raises:
        ValueError: unknown dtype.
    """
    if dtype == "bf16":
        return hidden_ND.to(torch.bfloat16), None
    if dtype == "f32":
        return hidden_ND.float(), None
    if dtype not in ("int8", "fp8"):
        raise ValueError(f"unknown hidden dtype {dtype!r}")
    values = hidden_ND.float()
    top = INT8_MAX if dtype == "int8" else FP8_MAX
    scale = values.abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny * top) / top
    scaled = values / scale[:, None]
    if dtype == "int8":
        return scaled.round().to(torch.int8), scale
    return scaled.to(torch.float8_e4m3fn), scale
