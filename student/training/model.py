"""The student and its objective as one module: what Trainer, accelerate and DDP see.

Shape letters: B batch, T positions, N learned positions of the batch, D hidden size, S terms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from student.data.batches import IGNORE
from student.data.decoding import Coded, decode_hidden, decode_labels, decode_targets
from student.data.mixture import mixed_logs, mixture
from student.data.teacher_weights import TeacherParts
from student.losses.blocks import BlockPair, Rotation, StudentBlock
from student.losses.catalogue import Need
from student.losses.full_pass import DenseTargets, dense_head_loss, fisher_diagonal
from student.losses.lm_head import HeadTransform
from student.losses.sparse import SparseTargets, cross_entropy, forward_kl, token_scale
from student.losses.sparse_pass import HeadLoss, ReducedLoss, sparse_head_loss
from student.objective.projectors import Projectors
from student.objective.terms import OUTSIDE_HEADS, Objective, View, reduction

HeadRow = tuple[ReducedLoss, float, tuple[int, ...]]  # a loss, its weight, the caches of its teachers
EVAL_COLUMNS = ("loss", "kl", "ce", "top1_agreement", "teacher_nll", "positions", "kl_positions")


class DistillationModel(nn.Module):
    """Runs the decoder body once, and the head only inside the fused loss, on learned positions only."""

    main_input_name = "input_ids"
    accepts_loss_kwargs = True  # tells Trainer to pass num_items_in_batch and not to rescale the loss

    def __init__(self, student: Any, objective: Objective, *teachers: TeacherParts) -> None:
        super().__init__()
        self.student = student
        self.projectors = Projectors(objective.projectors)
        self.objective = objective
        # Of the teacher of each cache, what dense and relation terms need.
        self.teachers = teachers or (TeacherParts(),) * len(objective.teachers)
        # The trainer sets both before each step.
        self.weights, self.shares = objective.weights_at(0.0), objective.shares_at(0.0)
        self.transform = HeadTransform.from_config(student.config)

    @property
    def config(self) -> Any:
        """The student's configuration, for Trainer's callbacks."""
        return self.student.config

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """Passed through to the student."""
        self.student.gradient_checkpointing_enable(**kwargs)

    def get_input_embeddings(self) -> nn.Module:
        """The student's embeddings, for NEFTune."""
        embeddings: nn.Module = self.student.get_input_embeddings()
        return embeddings

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        coded_head: Coded | None = None,
        coded_hidden: Mapping[int, Coded] | None = None,
        position_ids: Tensor | None = None,
        further: Mapping[int, Mapping[str, Any]] | None = None,
        weight: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """One batch as `student.data.matched.collator_of` lays it out -> {"loss": scalar, ...}.

        While training, "terms" [S] holds the unweighted terms, normalised like the loss. In eval mode "sums"
        [B, 7] holds each sequence's sums in the order of EVAL_COLUMNS, and a mixture of teachers is that of
        the end of the training, so that all evaluations of a training measure the same. Samples are padded on
        the right, so causal attention keeps padding out of every learned position and no mask is passed to
        the body. Rows that hold several samples come with position_ids, of which transformers makes a mask.
        With weight [B, T] the losses of each position, and "terms", are multiplied by its own, and
        num_items_in_batch is the sum of the weights: so losses are means in which a position counts in
        proportion.
        """
        learned_N = (labels.flatten() != IGNORE).nonzero().squeeze(1)
        with self._capture() as (states, rotations):
            body = self.student.get_decoder()(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        states[self._depth] = body.last_hidden_state
        stores = {0: {"coded_head": coded_head, "coded_hidden": coded_hidden}, **(further or {})}
        coded = {
            store: {name: select(part, learned_N) for name, part in (parts.get("coded_head") or {}).items()}
            for store, parts in stores.items()
        }
        places = _places(labels, position_ids)
        hidden = {store: parts.get("coded_hidden") or {} for store, parts in stores.items()}
        view = self._view(states, rotations, hidden, learned_N, places)
        rows = self._rows()
        teachers = dict.fromkeys(chosen for *_, chosen in rows)
        targets = self._targets(teachers, select(labels, learned_N), coded, view.sequence_N)
        weight_N = None if weight is None else select(weight, learned_N)
        head = self._head(select(body.last_hidden_state, learned_N), rows, targets, weight_N)
        dense_total, dense_SN = self._dense(view, weight_N)
        loss, other_SN = self._others(view, head.total + dense_total, weight_N)
        other_SN = torch.cat([dense_SN, other_SN])
        scale = _inverse_count(len(learned_N), weight_N, num_items_in_batch)
        if not self.training:
            sums = self._sums(head, other_SN, coded, view.sequence_N, len(labels))
            return {"loss": loss * scale, "sums": sums}
        terms = torch.cat([head.terms_SN[: len(self.objective.head)], other_SN]).sum(-1)
        return {"loss": loss * scale, "terms": terms * scale}

    @property
    def _shares(self) -> list[float]:
        """Of the teachers in a mixture."""
        return self.shares if self.training else self.objective.shares_at(1.0)

    @property
    def _depth(self) -> int:
        depth: int = self.student.config.get_text_config().num_hidden_layers
        return depth

    @contextmanager
    def _capture(self) -> Iterator[tuple[dict[int, Tensor], dict[int, Rotation | None]]]:
        """Collect the hidden states that terms need, and the rotations of positions that come with them, by
        hooks on the inputs of just those layers.
        """
        states: dict[int, Tensor] = {}
        rotations: dict[int, Rotation | None] = {}
        layers = self.student.get_decoder().layers
        wanted = {layer for term in self.objective.others for layer in term.student_layers} - {self._depth}

        def keep(index: int) -> Any:
            def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                states.setdefault(index, args[0] if args else kwargs["hidden_states"])
                rotations.setdefault(index, kwargs.get("position_embeddings"))

            return hook

        handles = [layers[index].register_forward_pre_hook(keep(index), with_kwargs=True) for index in wanted]
        try:
            yield states, rotations
        finally:
            for handle in handles:
                handle.remove()

    def _view(
        self,
        states: Mapping[int, Tensor],
        rotations: Mapping[int, Rotation | None],
        coded: Mapping[int, Mapping[int, Coded]],
        learned_N: Tensor,
        places: tuple[Tensor, Tensor],
    ) -> View:
        """The learned positions of a batch; coded: hidden states by cache and layer; places: sample and
        position of each of its positions.
        """

        def teacher(store: int, layer: int) -> Tensor:
            parts = coded[store][layer]
            states = {name: select(part, learned_N) for name, part in parts.items()}
            return decode_hidden(states, self.teachers[store].to(learned_N.device).bases)

        @cache
        def blocks(store: int, pair: tuple[int, int]) -> BlockPair:
            theirs, own = pair
            assert "weight" not in coded[store][theirs], "relations of positions need all of them"
            block = self.teachers[store].to(states[own].device).blocks[theirs]
            student = StudentBlock(self.student.get_decoder().layers[own])
            inputs = states[own], decode_hidden(coded[store][theirs])
            return BlockPair((student, block), *inputs, rotations[own])

        def weight(store: int, layer: int) -> Tensor | None:
            parts = coded[store][layer]
            return select(parts["weight"], learned_N) if "weight" in parts else None

        return View(
            student=lambda layer: select(states[layer], learned_N),
            teacher=teacher,
            blocks=blocks,
            fisher=lambda store: fisher_diagonal(self._full(store, teacher)),
            sequence_N=select(places[0], learned_N),
            position_N=select(places[1], learned_N),
            project=lambda name, states_ND: self.projectors[name](states_ND),
            weight=weight,
        )

    def _rows(self) -> list[HeadRow]:
        """What the head computes: the objective's head terms; in eval mode KL and CE follow with weight zero.
        A loss on labels alone goes with another's teachers.
        """
        terms, measured = self.objective.weighted(("head",), self.weights), self.objective.measured
        rows: list[HeadRow] = [(term.function, weight, term.teachers) for term, weight in terms]
        if not self.training:
            rows += [(forward_kl, 0.0, measured), (cross_entropy, 0.0, measured)]
        anyone = next((teachers for *_, teachers in rows if teachers), measured)
        return [(function, weight, teachers or anyone) for function, weight, teachers in rows]

    def _targets(
        self,
        wanted: Iterable[tuple[int, ...]],
        label_N: Tensor,
        coded: Mapping[int, Coded],
        sequence_N: Tensor,
    ) -> dict[tuple[int, ...], SparseTargets]:
        """The learned positions' targets by the caches of their teachers, mixed where they are several; heads
        of zero columns where the batch carries none.
        """
        labelled = any(Need.LABEL in term.loss.needs for term in self.objective.head)

        def targets(teachers: tuple[int, ...]) -> SparseTargets:
            parts = [decode_targets(coded[store], label_N) for store in teachers if coded[store]]
            if not parts:
                empty = label_N.new_empty(len(label_N), 0)
                return SparseTargets(
                    ids_NK=empty,
                    logprob_NK=empty.float(),
                    tail_N=torch.zeros_like(label_N, dtype=torch.float),
                    label_N=label_N,
                )
            made = parts[0] if len(parts) == 1 else mixture(parts, self._shares)
            if not labelled:
                return made
            known_N = self._label_logprobs(coded, teachers)
            return replace(made, label_logprob_N=known_N, token_scale_N=token_scale(known_N, sequence_N))

        return {teachers: targets(teachers) for teachers in wanted}

    def _label_logprobs(self, coded: Mapping[int, Coded], teachers: tuple[int, ...]) -> Tensor:
        """log p(label) of the teachers of some caches, mixed where they are several, [N]; NaN where one does
        not know it.
        """
        known = [decode_labels(coded[store]["label_logprob"]) for store in teachers]
        return known[0] if len(known) == 1 else mixed_logs(known, self._shares)

    def _head(
        self,
        hidden_ND: Tensor,
        rows: Sequence[HeadRow],
        targets: Mapping[tuple[int, ...], SparseTargets],
        weight_N: Tensor | None,
    ) -> HeadLoss:
        """The terms of `_rows`; the head is multiplied once for all that learn from the same teachers."""
        if not rows:  # other terms alone: the head is not even multiplied
            zero = hidden_ND.new_zeros((), dtype=torch.float32)
            return HeadLoss(zero, zero.new_zeros(0, len(hidden_ND)), zero.new_zeros(len(hidden_ND)).bool())
        terms = self.objective.head
        places: dict[tuple[int, ...], list[int]] = {}
        for place, (*_, teachers) in enumerate(rows):
            places.setdefault(teachers, []).append(place)
        output = self.student.get_output_embeddings()
        passes = {
            teachers: sparse_head_loss(
                hidden_ND=hidden_ND,
                weight_VD=output.weight,
                bias_V=output.bias,
                targets=targets[teachers],
                terms=[rows[place][:2] for place in chosen],
                transform=self.transform,
                reduction=reduction(terms[place] for place in chosen if place < len(terms)),
                scale_N=weight_N,
            )
            for teachers, chosen in places.items()
        }
        if len(passes) == 1:
            return next(iter(passes.values()))
        values = {
            place: value_N
            for teachers, chosen in places.items()
            for place, value_N in zip(chosen, passes[teachers].terms_SN, strict=True)
        }
        return HeadLoss(
            total=torch.stack([one.total for one in passes.values()]).sum(),
            terms_SN=torch.stack([values[place] for place in range(len(rows))]),
            agree_N=passes.get(self.objective.measured, next(iter(passes.values()))).agree_N,
        )

    def _dense(self, view: View, weight_N: Tensor | None) -> tuple[Tensor, Tensor]:
        """(weighted sum of the dense terms, their detached values [S', N]); float32."""
        weighted = self.objective.weighted(("dense",), self.weights)
        student_ND = view.student(self._depth)
        if not weighted:
            zero = student_ND.new_zeros((), dtype=torch.float32)
            return zero, zero.new_zeros(0, len(student_ND))
        output, total = self.student.get_output_embeddings(), None
        values: dict[int, Tensor] = {}
        for store in dict.fromkeys(term.teachers[0] for term, _ in weighted):
            chosen = [place for place, (term, _) in enumerate(weighted) if term.teachers[0] == store]
            part, values_SN = dense_head_loss(
                hidden_ND=student_ND,
                weight_VD=output.weight,
                bias_V=output.bias,
                targets=self._full(store, view.teacher),
                terms=[(weighted[place][0].function, weighted[place][1]) for place in chosen],
                transform=self.transform,
                scale_N=weight_N,
            )
            total = part if total is None else total + part
            values |= dict(zip(chosen, values_SN, strict=True))
        assert total is not None
        return total, torch.stack([values[place] for place in range(len(weighted))])

    def _full(self, store: int, teacher: Callable[[int, int], Tensor]) -> DenseTargets:
        """The full distributions of a cache's teacher at the learned positions."""
        layer = next(
            term.pair[0]
            for term in self.objective.of_teacher(store)
            if Need.FULL in term.loss.needs and term.pair
        )
        hidden_ND = teacher(store, layer).float()
        head = self.teachers[store].to(hidden_ND.device).head
        assert head is not None, "the objective needs the teacher's head"
        return DenseTargets(head, hidden_ND)

    def _others(self, view: View, loss: Tensor, weight_N: Tensor | None) -> tuple[Tensor, Tensor]:
        """(`loss` and the weighted sum of the terms outside any head, their detached values [S', N])."""
        values = [loss.new_zeros(0, len(view.sequence_N))]
        for term, weight in self.objective.weighted(OUTSIDE_HEADS, self.weights):
            value_N = term.values(view) if weight_N is None else term.values(view) * weight_N
            loss = loss + weight * value_N.sum()
            values.append(value_N.detach().unsqueeze(0))
        return loss, torch.cat(values)

    def _sums(
        self,
        head: HeadLoss,
        other_SN: Tensor,
        coded: Mapping[int, Coded],
        sequence_N: Tensor,
        sequences: int,
    ) -> Tensor:
        """Per-sequence sums of what evaluation reports, float32 [B, 7]."""
        kl_N, ce_N = head.terms_SN[-2:]
        objective_SN = torch.cat([head.terms_SN[:-2], other_SN])
        weights_S = objective_SN.new_tensor(self.weights)
        ones_N, measured = torch.ones_like(ce_N), self.objective.measured
        has_head = all(coded[store] for store in measured)
        known_N = ones_N if has_head else torch.zeros_like(ones_N)
        columns = [
            (weights_S.unsqueeze(1) * objective_SN).sum(0),
            kl_N if has_head else known_N,
            ce_N,
            head.agree_N,
            -self._label_logprobs(coded, measured) if has_head else known_N,
            ones_N,
            known_N,
        ]
        values_N7 = torch.stack([column.to(ce_N.dtype) for column in columns], dim=-1)
        sums = values_N7.new_zeros(sequences, len(EVAL_COLUMNS))
        return sums.index_add_(0, sequence_N, values_N7)


def _inverse_count(learned: int, weight_N: Tensor | None, num_items: Tensor | int | None) -> Tensor | float:
    """What sums are multiplied by to be means: 1 / learned positions, or 1 / sum of their weights. num_items:
    that of the whole accumulated batch, if it is known.
    """
    if weight_N is not None:
        total = weight_N.sum() if num_items is None else torch.as_tensor(num_items, device=weight_N.device)
        return 1.0 / torch.where(total > 0, total, 1.0)
    count = learned if num_items is None else num_items
    return 1.0 / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))


def select(tensor_BT: Tensor, positions_N: Tensor) -> Tensor:
    """Positions of [B, T, ...], numbered through the batch, as [N, ...]; quicker than a mask."""
    return tensor_BT.flatten(0, 1).index_select(0, positions_N)


def _places(labels_BT: Tensor, position_ids_BT: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of each position of a batch the number of its sample, rising, and its position there: int64 [B, T]."""
    if position_ids_BT is None:
        position_ids_BT = torch.arange(labels_BT.shape[1], device=labels_BT.device).expand_as(labels_BT)
    return ((position_ids_BT == 0).flatten().cumsum(0) - 1).view_as(labels_BT), position_ids_BT
