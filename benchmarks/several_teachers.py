"""How close the gradient of two cached teachers, mixed, comes to that of both teachers running.

The demo teacher and a second one predict the first samples of the demo text: the same with noise on its
matrices, and a copy that was fine-tuned on a part of that text (`shifted_teacher.py`). The live mixture is
the mean of their distributions over the whole vocabulary. The caches hold what a capture keeps of each: heads
of mass 0.5, at most 8 tokens, and M draws (without the rounding of the store, which store_size.py measures).
Gradients are with respect to the final states of a student, the demo teacher with other noise; angle and
error are those of the gradients of all positions as one vector.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import torch
from common import RUN, table, write_result
from shifted_teacher import shifted_teacher
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from featurestore.format.schema import LogitsSpec
from featurestore.format.tail import row_shifts
from pipeline.capture.reduce import reduce_logits
from student.data.mixture import mixed_logs, mixture
from student.losses.lm_head import HeadTransform
from student.losses.sparse import SparseTargets, forward_kl
from student.losses.sparse_pass import sparse_head_loss

ROWS, LENGTH = 2, 48
SEEDS = int(os.environ.get("SEEDS", "64"))
WEIGHTS = (0.5, 0.5)
FAR = 10_000  # seeds that no other teacher has


@torch.no_grad()
def predictions(
    tokens: Tensor, noise: float = 0.0, seed: int = 0, teacher: Path = RUN / "teacher"
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [N, V], final states [N, D] and LM head [V, D] of a teacher with noise on its matrices, relative
    to their spread.
    """
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if noise and weight.dim() == 2:
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=noise * float(weight.std()))
    states = model.get_decoder()(input_ids=tokens).last_hidden_state.flatten(0, 1)
    return model.lm_head(states), states, model.lm_head.weight.detach().clone()


def targets(logits_NV: Tensor, spec: LogitsSpec) -> SparseTargets:
    """What a capture keeps, decoded."""
    n = len(logits_NV)
    shifts = torch.from_numpy(row_shifts(np.arange(n), 0, n, spec.seed))
    labels = torch.zeros(n, dtype=torch.long)
    kept = reduce_logits(
        logits_NV=logits_NV,
        labels_N=labels,
        top_k=spec.top_k,
        top_p=spec.top_p,
        tail=spec.tail,
        shifts_N=shifts,
    )
    real_NK = torch.arange(spec.top_k) < kept.counts.unsqueeze(-1)
    head_NK = (kept.head_logits - kept.lse.unsqueeze(-1)).masked_fill(~real_NK, -math.inf)
    top_N1 = kept.head_ids[:, :1].long()
    ids_NK = torch.where(real_NK, kept.head_ids.long(), top_N1)
    outside_N = torch.log1p(-head_NK.exp().sum(-1))
    draws_NM = kept.tail_draws
    if draws_NM is None:
        return SparseTargets(ids_NK=ids_NK, logprob_NK=head_NK, tail_N=outside_N, label_N=labels)
    # Each distinct draw is one column, with the weight of all its repeats.
    equal_NMM = draws_NM.unsqueeze(-1) == draws_NM.unsqueeze(-2)
    first_NM = ~equal_NMM.tril(-1).any(-1)
    share_NM = equal_NMM.sum(-1).div(spec.tail).log() + outside_N.unsqueeze(-1)
    return SparseTargets(
        ids_NK=torch.cat([ids_NK, torch.where(first_NM, draws_NM.long(), top_N1)], -1),
        logprob_NK=torch.cat([head_NK, share_NM.masked_fill(~first_NM, -math.inf)], -1),
        tail_N=torch.full_like(outside_N, -math.inf),
        label_N=labels,
        entropy_N=kept.entropy,
        draws=spec.tail,
    )


class Student:
    """Its states and head, and what of a gradient does not depend on the teacher."""

    def __init__(self, states_ND: Tensor, weight_VD: Tensor) -> None:
        self.states_ND, self.weight_VD = states_ND, weight_VD
        self.log_q_NV = (states_ND @ weight_VD.t()).log_softmax(-1)
        self._mean_ND = self.log_q_NV.exp() @ weight_VD

    def live(self, log_p_NV: Tensor) -> Tensor:
        """(q - p) W, [N, D]."""
        return self._mean_ND - log_p_NV.exp() @ self.weight_VD

    def sampled(self, wanted: SparseTargets) -> Tensor:
        """The same for a sparse measure that sums to one."""
        p_NK = wanted.logprob_NK.exp()
        return self._mean_ND - torch.einsum("nk,nkd->nd", p_NK, self.weight_VD[wanted.ids_NK])

    def product(self, wanted: SparseTargets) -> Tensor:
        """By the loss that a training uses."""
        leaf = self.states_ND.clone().requires_grad_()
        loss = sparse_head_loss(
            hidden_ND=leaf,
            weight_VD=self.weight_VD,
            bias_V=None,
            targets=wanted,
            terms=[(forward_kl, 1.0)],
            transform=HeadTransform(),
        ).total
        return torch.autograd.grad(loss, leaf)[0]


def angle(one: Tensor, other: Tensor) -> float:
    """In degrees."""
    return math.degrees(math.acos(min(1.0, float(torch.cosine_similarity(one.ravel(), other.ravel(), 0)))))


def main() -> None:
    """Print a table."""
    tokenizer = AutoTokenizer.from_pretrained(RUN / "teacher")
    with (RUN / "topics.jsonl").open(encoding="utf-8") as file:
        texts = [json.loads(next(file))["text"] for _ in range(ROWS)]
    tokens = torch.tensor([tokenizer(text).input_ids[:LENGTH] for text in texts])
    student = Student(*predictions(tokens, 0.3, 2)[1:])
    first = predictions(tokens)[0]
    pairs = {
        "The same teacher with noise": predictions(tokens, 0.1, 1)[0],
        "The same teacher, fine-tuned": predictions(tokens, teacher=shifted_teacher())[0],
    }
    parts = [f"## {name}\n\n{_pair((first, second), student)}" for name, second in pairs.items()]
    write_result(
        "several_teachers",
        "The gradient of two cached teachers, mixed",
        f"{__doc__.strip() if __doc__ else ''}\n\n"
        f"{tokens.numel()} positions, V = {first.shape[1]:,}. {SEEDS} sets of draws. Angles are in degrees "
        "to the live gradient, of the first teacher alone and of the mixture (captures with one seed for "
        "both teachers, and with two). Errors are relative to the live gradient, of mixtures with two "
        "seeds.\n\n" + "\n\n".join(parts),
    )


def _pair(logits: tuple[Tensor, Tensor], student: Student) -> str:
    """What there is to say of two teachers."""
    every = [z.log_softmax(-1) for z in logits]
    mixed = mixed_logs(every, WEIGHTS)
    exact = student.live(mixed)
    rows, worst = [], 0.0
    for draws in (4, 16, 64):
        found: dict[str, list[Tensor]] = {"alone": [], "same": [], "other": []}
        for seed in range(SEEDS):
            specs = [LogitsSpec(8, 0.5, draws, s) for s in (seed, seed, FAR + seed)]
            first, same, other = (targets(logits[i], spec) for i, spec in zip((0, 1, 1), specs, strict=True))
            if not seed:
                check = mixture([first, other], WEIGHTS)
                gap = (student.product(check) - student.sampled(check)).norm() / exact.norm()
                assert gap < 1e-4, gap
                worst = max(worst, _head_error(check, (first, other), mixed))
            found["alone"].append(student.sampled(first))
            for name, second in (("same", same), ("other", other)):
                found[name].append(student.sampled(mixture([first, second], WEIGHTS)))
        rows.append([str(draws), *_row(found, student.live(every[0]), exact)])
    heads = [targets(z, LogitsSpec(8, 0.5)) for z in logits]
    dropped = student.product(mixture(heads, WEIGHTS))
    kl = [float((p.exp() * (p - mixed)).sum(-1).mean()) for p in every]
    apart = float((every[0].exp() * (every[0] - every[1])).sum(-1).mean())
    angles = ["1 set, alone", "1 set, one seed", "1 set, two seeds"]
    errors = [f"error of the mean of {n} sets" for n in _SETS]
    return (
        f"The second teacher is {apart:.2f} nats from the first, and both are {sum(kl) / 2:.2f} nats from "
        "their mixture.\n\n"
        + table(["draws M", *angles, *errors], rows)
        + "\n\nThe probability of a token that the heads of both teachers hold differs from the live "
        f"mixture's by a factor of at most 1 ± {worst:.0e}. "
        "Heads alone, with the rest of each teacher as one outcome outside all heads (refused): "
        f"{angle(dropped, exact):.1f} degrees, and no average makes that less."
    )


def _head_error(mixed: SparseTargets, parts: tuple[SparseTargets, ...], exact_NV: Tensor) -> float:
    """Of probabilities of tokens in the heads of all parts, the largest relative error."""
    held_NV = torch.ones_like(exact_NV, dtype=torch.bool)
    for part in parts:
        columns = slice(part.head_columns)
        real_NK = torch.isfinite(part.logprob_NK[:, columns]).int()
        held_NV &= (
            torch.zeros_like(held_NV, dtype=torch.int32)
            .scatter_add_(1, part.ids_NK[:, columns], real_NK)
            .bool()
        )
    p_NV = torch.zeros_like(exact_NV).scatter_add_(1, mixed.ids_NK, mixed.logprob_NK.exp())
    assert held_NV.any()
    return float((p_NV[held_NV] / exact_NV.exp()[held_NV] - 1).abs().max())


_SETS = (1, 4, 16, 64)


def _row(found: dict[str, list[Tensor]], alone: Tensor, exact: Tensor) -> list[str]:
    angles = [
        np.mean([angle(one, alone if name == "alone" else exact) for one in gradients])
        for name, gradients in found.items()
    ]
    every = torch.stack(found["other"])
    errors = []
    for n in _SETS:
        groups = every[: len(every) // n * n].unflatten(0, (-1, n)).mean(1) if n <= len(every) else every[:0]
        squares = (groups - exact).flatten(1).norm(dim=1).square()
        errors.append(float((squares.mean().sqrt()) / exact.norm()))
    return [f"{one:.1f}" for one in angles] + [f"{one:.3f}" for one in errors]


if __name__ == "__main__":
    main()
