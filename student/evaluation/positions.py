"""A few samples of a cache position by position: what the teacher and the student expected, and how far apart
they were. eval-samples.json, for the report.

Shape letters: N positions, K alternatives, V vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distily.system.files import write_whole
from distily.text import token_text
from student.data.batches import IGNORE
from student.data.indices import longest_places
from student.evaluation.cache import CachePlan, LearnedStates, learned_states, measure_batch
from student.losses.full_pass import TeacherHead
from student.losses.lm_head import ChunkedHead, HeadTransform
from student.report.files import SAMPLES

VERSION = 1
# So many samples, the first that are long enough and else the longest; of each so many tokens, from a few
# before the first that is learned; and of each side so many alternatives.
MOST_SAMPLES, LONG_ENOUGH = 2, 64
MOST_TOKENS, TOKENS_BEFORE = 256, 32
BEST = 5
_CHUNK = 64  # positions whose logits are held at a time

Record = dict[str, Any]


def look_at_samples(student: Any, plan: CachePlan, head: TeacherHead | None, tokenizer: Any) -> Record:
    """What eval-samples.json says of the samples and their tokens; head: the teacher's, as for `measure`."""
    places = longest_places(plan.reader.lengths, plan.indices, MOST_SAMPLES, LONG_ENOUGH)
    found = (_sample(student, plan, plan.indices[place], head) for place in places)
    samples = [sample for sample in found if sample is not None]
    texts = {str(token): token_text(tokenizer, token) for token in sorted(_tokens(samples))}
    return {"version": VERSION, "samples": samples, "texts": texts}


def write_samples(directory: Path, record: Record, weights: str, manifest: str) -> None:
    """Beside eval.json, with what tells that both are of the same weights and cache."""
    text = json.dumps(record | {"weights": weights, "manifest": manifest}, separators=(",", ":"))
    write_whole(directory / SAMPLES, text + "\n")


def _sample(student: Any, plan: CachePlan, index: int, head: TeacherHead | None) -> Record | None:
    """None for a sample of which nothing is learned."""
    (sample,) = plan.read([index])
    batch = plan.collate([sample])
    if not bool((batch["labels"] != IGNORE).any()):
        return None
    read = learned_states(student, batch, plan)
    columns = measure_batch(student, batch, read, head)
    start = max(0, int(columns["position"][0]) + 1 - TOKENS_BEFORE)
    tokens = sample.tokens[start : start + MOST_TOKENS].tolist()
    # A position is about the token after it.
    count = int((columns["position"] + 1 < start + len(tokens)).sum())
    return {
        "id": sample.id,
        "length": len(sample.tokens),
        "start": start,
        "tokens": tokens,
        "positions": _positions(student, read, columns, count),
    }


def _positions(student: Any, read: LearnedStates, columns: dict[str, Tensor], count: int) -> list[Record]:
    """The first `count` positions that are learned."""
    named = {name: columns[name][:count].tolist() for name in ("kl", "ce", "teacher_ce", "entropy")}
    targets = read.targets.slice(0, count)
    logprob_NK = targets.logprob_NK[:, : targets.head_columns]  # without draws
    mass = logprob_NK.exp().sum(-1).tolist()
    theirs = _alternatives(targets.ids_NK, logprob_NK)
    own = _alternatives(*_best(student, read.states_ND[:count]))
    return [
        {
            "position": position,
            **{name: _number(values[place]) for name, values in named.items()},
            "head_mass": _number(mass[place]),
            "teacher": theirs[place],
            "student": own[place],
        }
        for place, position in enumerate(columns["position"][:count].tolist())
    ]


@torch.no_grad()
def _best(student: Any, states_ND: Tensor) -> tuple[Tensor, Tensor]:
    """The student's most likely tokens, int64 [N, K], and their log-probabilities [N, K]."""
    output = student.get_output_embeddings()
    head = ChunkedHead(
        hidden_ND=states_ND,
        weight_VD=output.weight,
        bias_V=output.bias,
        transform=HeadTransform.from_config(student.config),
        chunk=_CHUNK,
        needs=(False, False, False),
    )
    parts = [head.logits(rows).log_softmax(-1).topk(min(BEST, len(output.weight))) for rows in head.chunks()]
    return torch.cat([part.indices for part in parts]), torch.cat([part.values for part in parts])


def _alternatives(ids_NK: Tensor, logprob_NK: Tensor) -> list[list[tuple[int, float]]]:
    """(token, probability) of each position, both of descending probability; what has none is left out."""
    width = min(BEST, logprob_NK.shape[1])
    rows = zip(ids_NK[:, :width].tolist(), logprob_NK[:, :width].exp().tolist(), strict=True)
    return [[(token, _rounded(p)) for token, p in zip(*row, strict=True) if p > 0] for row in rows]


def _tokens(samples: Iterable[Record]) -> set[int]:
    sides = (
        row[side] for sample in samples for row in sample["positions"] for side in ("teacher", "student")
    )
    return {token for best in sides for token, _ in best} | {
        token for sample in samples for token in sample["tokens"]
    }


def _number(value: float) -> float | None:
    """None for one that is not known."""
    return _rounded(value) if math.isfinite(value) else None


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
