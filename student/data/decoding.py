"""From stored codes to what losses read, on the device of the codes, without a loop over rows.

The same numbers as `featurestore.format.codec` gives, for padded batches: a batch travels as small integers,
and what is learned from it is decoded where it is used.

Shape letters: N positions, K head columns (padded), M tail draws, D hidden size.
"""

# ruff: noqa: N815  (shape suffixes on dataclass fields)

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import softplus

from featurestore.format.codec import CLOSED, ODDS_STEPS, ROW_STEPS, STEPS_PER_NAT
from featurestore.format.states.rotated import (
    BLOCK,
    PATTERNS,
    ROTATED,
    RotatedLayout,
    levels,
    signs_of,
    unrotate_,
)
from featurestore.format.states.transform import SCALE_BYTES, TRANSFORMED, Basis, Width
from student.losses.sparse import SparseTargets, Tempered

Coded = Mapping[str, Tensor]
LSE = "lse.T"  # how the entries of other temperatures are named, e.g. lse.T2
MIN_TAIL = 2.0**-20


@dataclass(frozen=True, eq=False, kw_only=True)
class Transform:
    """A basis on a device: mean [D], decode [r, D], and of each width of codes what it is and its levels;
    float32.
    """

    mean_D: Tensor
    decode_rD: Tensor
    widths: tuple[tuple[Width, Tensor], ...]

    @classmethod
    def of(cls, basis: Basis) -> Transform:
        """On the CPU."""
        return cls(
            mean_D=torch.from_numpy(basis.mean.copy()),
            decode_rD=torch.from_numpy(basis.decode.copy()),
            widths=tuple((width, torch.from_numpy(width.levels.copy())) for width in basis.widths()),
        )

    @property
    def tensors(self) -> list[Tensor]:
        """All of them."""
        return [self.mean_D, self.decode_rD, *(table for _, table in self.widths)]

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Transform:
        """The same with each tensor replaced, e.g. by its copy on another device."""
        return replace(
            self,
            mean_D=function(self.mean_D),
            decode_rD=function(self.decode_rD),
            widths=tuple((width, function(table)) for width, table in self.widths),
        )


def decode_targets(coded: Coded, label_N: Tensor) -> SparseTargets:
    """The teacher's distributions of N positions, coded as `student.data.batches.Collator` lays them out.

    Head and tail of a row sum to one in float32. Padding columns repeat the row's first id. Draws become
    further columns, each distinct one once, of probability repeats * tail mass / M; nothing is left outside
    then.
    """
    ids_NK, odds_N = coded["ids"], coded["odds"]
    rank_K = torch.arange(ids_NK.shape[1], dtype=torch.int32, device=ids_NK.device)
    score_NK = torch.cumsum(unsigned(coded["gaps"]), -1, dtype=torch.float32).mul_(-1.0 / STEPS_PER_NAT)
    score_NK.masked_fill_(rank_K >= unsigned(coded["counts"]).unsqueeze(-1), -math.inf)
    log_odds_N = odds_N.float().masked_fill_(odds_N == CLOSED, math.inf).div_(ODDS_STEPS)
    tail_N = -softplus(log_odds_N)
    # A row's best score is 0, so the sum needs no shift; exp of what vanishes beside it is slow on CPUs.
    norm_N = score_NK.clamp_min(-80.0).exp_().sum(-1).log_()
    logprob_NK = score_NK.sub_((norm_N + softplus(-log_odds_N)).unsqueeze(-1))
    tempered = {
        float(name.removeprefix(LSE)): temper(
            logprob_NK, tail_N, coded["lse"], float(name[len(LSE) :]), lse_N
        )
        for name, lse_N in coded.items()
        if name.startswith(LSE)
    }
    if "draws" not in coded:
        return SparseTargets(
            ids_NK=ids_NK.long(), logprob_NK=logprob_NK, tail_N=tail_N, label_N=label_N, tempered=tempered
        )
    draws_NM, top_N1 = coded["draws"], ids_NK[:, :1]
    drawn_N = draws_NM[:, 0] != top_N1[:, 0]  # no draw is inside the head
    repeats_NM = coded["repeats"] * drawn_N.unsqueeze(-1)
    share_M = torch.arange(draws_NM.shape[1] + 1, device=ids_NK.device).float().div_(draws_NM.shape[1]).log_()
    share_NM = share_M.index_select(0, repeats_NM.flatten()).view_as(draws_NM).add_(tail_N.unsqueeze(-1))
    # Arithmetic, since selecting by a random mask is slow on CPUs.
    draws_NM = (draws_NM - top_N1).mul_(repeats_NM > 0).add_(top_N1)
    return SparseTargets(
        ids_NK=torch.cat([ids_NK, draws_NM], dim=-1).long(),
        logprob_NK=torch.cat([logprob_NK, share_NM], dim=-1),
        tail_N=tail_N.masked_fill(drawn_N, -math.inf),
        label_N=label_N,
        entropy_N=(unsigned(coded["entropy"]) / ROW_STEPS).masked_fill_(~drawn_N, math.nan),
        draws=draws_NM.shape[1],
        tempered=tempered,
    )


def temper(
    logprob_NK: Tensor, tail_N: Tensor, lse_codes_N: Tensor, temperature: float, lse_N: Tensor
) -> Tempered:
    """The head at a temperature T: log p_T = logit / T - lse_T, with logit = log p + lse.

    logprob_NK: log p of the head (padding -inf); tail_N: log of the mass outside, -inf where that is nothing;
    lse_codes_N: int32 as stored; lse_N: float32, logsumexp(logits / T). Where the roundings of the two leave
    the head more than all mass, it is scaled to all but MIN_TAIL.
    """
    logit_NK = logprob_NK + (lse_codes_N / ROW_STEPS).unsqueeze(-1)
    at_NK = logit_NK / temperature - lse_N.unsqueeze(-1)
    mass_N = torch.logsumexp(at_NK, -1)
    closed_N = torch.isneginf(tail_N)
    allowed_N = torch.where(closed_N, 0.0, mass_N.clamp(max=math.log1p(-MIN_TAIL)))
    at_NK = at_NK - (mass_N - allowed_N).unsqueeze(-1)
    return Tempered(at_NK, torch.log(-torch.expm1(allowed_N)))


def decode_labels(codes_N: Tensor) -> Tensor:
    """The teacher's log-probability of the next token, float32 [N]; NaN where it is not known."""
    return codes_N.float().div_(-ROW_STEPS).masked_fill_(codes_N == -1, math.nan)


def unsigned(bits: Tensor) -> Tensor:
    """int16 that holds the bits of uint16 -> int32."""
    return bits.to(torch.int32) & 0xFFFF


def decode_hidden(coded: Coded, bases: Mapping[str, Transform] | None = None) -> Tensor:
    """Hidden states [N, D] in float32, or in bfloat16 where they are stored so. bases: by digest, on the
    device of the codes, for klt4 and klt6.
    """
    for name, rows_NW in coded.items():
        dtype, _, size = name.partition(".")
        if dtype in TRANSFORMED:
            return _decode_transformed(rows_NW, (bases or {})[size])
        if dtype in ROTATED:
            return _decode_rotated(rows_NW, RotatedLayout(dtype, int(size)))
    values_ND = coded["values"]
    if "scale" not in coded:
        return values_ND
    if values_ND.dtype == torch.uint8:
        values_ND = values_ND.view(torch.float8_e4m3fn)
    return values_ND.float() * coded["scale"].unsqueeze(-1)


def _decode_rotated(rows: Tensor, layout: RotatedLayout) -> Tensor:
    """float32 [..., D] of rows of bytes [..., W], as `featurestore.format.states.rotated` has them."""
    rows_NW = rows.flatten(0, -2)
    codes_NC, *parts = (part.contiguous() for part in rows_NW.tensor_split(layout.ends[:-1], dim=-1))
    dtypes = (torch.bfloat16, torch.int16, torch.bfloat16)
    scale_NS, columns_NK, outliers_NK = map(Tensor.view, parts, dtypes)
    table = levels(torch.arange(2**layout.bits, dtype=torch.float32, device=rows.device), layout.bits)
    codes_CN, mask = codes_NC.t().int(), 2**layout.bits - 1
    numbers = [table[codes_CN >> shift & mask] for shift in range(0, 8, layout.bits)]
    states_PN = torch.stack(numbers, dim=1).view(layout.padded, -1)
    states_PN.view(layout.blocks, BLOCK, -1).mul_(scale_NS.t().float().unsqueeze(1))
    columns = torch.arange(layout.padded + PATTERNS, device=rows.device)
    unrotate_(states_PN, signs_of(columns, rows_NW[:, layout.ends[1] :].long(), layout))
    states_ND = states_PN[: layout.size].t().contiguous()
    states_ND.scatter_add_(-1, unsigned(columns_NK).long(), outliers_NK.float())
    return states_ND.view(*rows.shape[:-1], layout.size)


def _decode_transformed(rows: Tensor, basis: Transform) -> Tensor:
    """float32 [..., D] of rows of bytes [..., W], as `featurestore.format.states.transform` has them."""
    rows_NW = rows.flatten(0, -2)
    scale_N1 = (
        rows_NW[:, :SCALE_BYTES].clone(memory_format=torch.contiguous_format).view(torch.bfloat16).float()
    )
    shifts = torch.arange(8, dtype=torch.uint8, device=rows.device)
    bits = (rows_NW[:, SCALE_BYTES:, None] >> shifts & 1).flatten(1)
    parts = []
    for width, table in basis.widths:
        end = width.start + width.bits * width.count
        codes_NCb = bits[:, width.start : end].view(-1, width.count, width.bits).int()
        places = torch.arange(width.bits, dtype=torch.int32, device=rows.device)
        parts.append(table[(codes_NCb << places).sum(-1)])
    at_Nr = torch.cat(parts, dim=-1) * scale_N1
    states_ND = torch.addmm(basis.mean_D, at_Nr, basis.decode_rD)
    return states_ND.view(*rows.shape[:-1], -1)
