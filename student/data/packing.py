"""Several samples of a batch in one row, whole, so that less of the batch is padding.

transformers keeps the samples of a row apart by position ids that begin anew with each sample, and builds the
block mask from them where its attention reads masks; `check_packing` tries it on the student at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch

from featurestore.reader import CodedSample
from student.data.measures import WeighedSample
from student.errors import UserError


def plan_rows(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Which samples share a row of at most `limit` positions: first-fit decreasing, equal lengths in the
    order given. Every sample is in one row, whole; none may be longer than `limit`.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[index]
        assert length <= limit
        row = next((row for row, free in enumerate(room) if free >= length), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(limit)
        rows[row].append(index)
        room[row] -= length
    return rows


def pack(samples: Sequence[CodedSample]) -> tuple[list[CodedSample], list[list[int]]]:
    """(one sample for each row, the lengths of the samples in it); rows are as long as the longest sample.

    The first token of each sample counts as not learned: nothing before it in its row may predict it.
    """
    lengths = [len(sample.tokens) for sample in samples]
    rows = plan_rows(lengths, max(lengths))
    return [_joined([samples[i] for i in row]) for row in rows], [[lengths[i] for i in row] for row in rows]


def position_ids(lengths: Sequence[Sequence[int]], width: int) -> torch.Tensor:
    """int64 [rows, width]: 0, 1, ... anew for each sample; padding counts on."""
    ids = np.tile(np.arange(width), (len(lengths), 1))
    for row, members in zip(ids, lengths, strict=True):
        for start in np.cumsum(members)[:-1]:
            row[start:] = np.arange(width - start)
    return torch.from_numpy(ids)


def _joined(samples: Sequence[CodedSample]) -> CodedSample:
    masks = [sample.loss_mask.copy() for sample in samples]
    for mask in masks:
        mask[0] = False
    starts = [0, *np.cumsum([len(sample.tokens) for sample in samples])[:-1].tolist()]
    weights = [sample.weight for sample in samples if isinstance(sample, WeighedSample)]
    known = [weight for weight in weights if weight is not None]
    return WeighedSample(
        id="+".join(sample.id for sample in samples),
        tokens=np.concatenate([sample.tokens for sample in samples]),
        loss_mask=np.concatenate(masks),
        features={
            spec: _join_codes([s.features[spec] for s in samples], starts) for spec in samples[0].features
        },
        weight=np.concatenate(known) if known else None,
    )


def _join_codes(codes: Sequence[Any], starts: Sequence[int]) -> Any:
    """The rows of all, one sample's after the other's; starts: where each sample begins in the row."""
    parts = {field.name: [getattr(one, field.name) for one in codes] for field in fields(codes[0])}
    arrays = {n: np.concatenate(part) for n, part in parts.items() if isinstance(part[0], np.ndarray)}
    if "positions" in arrays:
        moved = [start + positions for start, positions in zip(starts, parts["positions"], strict=True)]
        arrays["positions"] = np.concatenate(moved)
    return replace(codes[0], **arrays)


def check_packing(student: Any) -> None:
    """UserError when the second sample of a row sees the first one, as in models whose layers carry a state
    along, or whose attention builds no mask from position ids.

    The gradient of the second sample's states with respect to the first one's embeddings is 0, without any
    rounding, where masks keep the two apart, and nothing else is: however little is carried over, it shows.
    """
    first, second = [1, 2, 3], [4, 5, 6, 7]
    config = student.config.get_text_config()
    tokens_1T = torch.tensor([[*first, *second]], device=student.device) % config.vocab_size
    places_1T = position_ids([[len(first), len(second)]], tokens_1T.shape[1]).to(student.device)
    embedded: list[torch.Tensor] = []

    def watch(_module: Any, _args: Any, out: torch.Tensor) -> torch.Tensor:
        embedded.append(out.detach().requires_grad_())
        return embedded[-1]

    watched = student.get_input_embeddings().register_forward_hook(watch)
    training = student.training
    student.eval()
    try:
        run = student.get_decoder()(input_ids=tokens_1T, position_ids=places_1T, use_cache=False)
    finally:
        watched.remove()
        student.train(training)
    states_TD = run.last_hidden_state[0, len(first) :].float()
    # Not their sum: behind a norm, sums of states may be constant.
    weights = torch.linspace(-1, 2, states_TD.numel(), device=states_TD.device).view_as(states_TD)
    (gradient_1TD,) = torch.autograd.grad((states_TD * weights).sum(), embedded)
    if gradient_1TD[0, : len(first)].any():
        raise UserError(
            f"--pack-rows: {type(student).__name__} with {student.config._attn_implementation} attention "
            "does not keep the samples of a row apart; leave the flag out"
        )
