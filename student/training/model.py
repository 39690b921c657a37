"""The student and its objective as one module: what Trainer, accelerate and DDP see.

Shape letters: B batch, T positions, N learned positions of the batch, D hidden size, S terms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from student.data.batches import IGNORE
from student.data.decoding import Coded, decode_hidden, decode_labels, decode_targets
from student.data.mixture import mixed_logs, mixture
from student.data.teacher_weights import TeacherParts
from student.data.token_map import DeviceMap, NextTokens, first_tokens, shared_tokens
from student.losses.blocks import BlockPair, Rotation, StudentBlock
from student.losses.catalogue import Need
from student.losses.full_pass import DenseTargets, dense_head_loss, fisher_diagonal
from student.losses.lm_head import HeadTransform
from student.losses.sparse import (
    SparseTargets,
    along_spans,
    cross_entropy,
    forward_kl,
    outcome_kl,
    token_scale,
    where_known,
)
from student.losses.sparse_pass import HeadLoss, ReducedLoss, sparse_head_loss
from student.objective.projectors import Projectors
from student.objective.terms import OUTSIDE_HEADS, Objective, Term, View, reduction

EVAL_COLUMNS = ("loss", "kl", "ce", "top1_agreement", "teacher_nll", "positions", "kl_positions")
# Behind them for a student with another tokenizer: bytes of its learned tokens and of the teacher's.
BYTE_COLUMNS = ("bytes", "teacher_bytes")


class TargetSource(NamedTuple):
    """What a loss learns from: the caches of its teachers; shared: of a teacher with another tokenizer, only
    the tokens that both have.
    """

    teachers: tuple[int, ...]
    shared: bool = False


HeadRow = tuple[ReducedLoss, float, TargetSource]  # a loss, its weight, what it learns from


class DistillationModel(nn.Module):
    """Runs the decoder body once, and the head only inside the fused loss, on learned positions only."""

    main_input_name = "input_ids"
    accepts_loss_kwargs = True  # tells Trainer to pass num_items_in_batch and not to rescale the loss

    def __init__(
        self, student: Any, objective: Objective, *teachers: TeacherParts, tokens: DeviceMap | None = None
    ) -> None:
        """tokens: what the teacher's tokens are to a student with another tokenizer."""
        super().__init__()
        self.tokens = tokens
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
        aligned: Mapping[str, Tensor] | None = None,
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
        features = _Features(learned_N, labels.shape[1], aligned)
        stores = {0: {"coded_head": coded_head, "coded_hidden": coded_hidden}, **(further or {})}
        coded = {
            store: {name: features(part) for name, part in (parts.get("coded_head") or {}).items()}
            for store, parts in stores.items()
        }
        places = _places(labels, position_ids)
        hidden = {store: parts.get("coded_hidden") or {} for store, parts in stores.items()}
        view = self._view(states, rotations, hidden, features, places)
        rows = self._rows()
        sources = dict.fromkeys(source for *_, source in rows)
        targets = self._targets(sources, select(labels, learned_N), coded, view.sequence_N, features)
        if features.aligned is not None and any(term.loss.spans for term in self.objective.head):
            spans_N2 = self._spans(select(body.last_hidden_state, learned_N), targets, features)
            targets = {source: replace(one, spans_N2=spans_N2) for source, one in targets.items()}
        weight_N = None if weight is None else select(weight, learned_N)
        head = self._head(select(body.last_hidden_state, learned_N), rows, targets, weight_N)
        dense_total, dense_SN = self._dense(view, weight_N)
        loss, other_SN = self._others(view, head.total + dense_total, weight_N)
        other_SN = torch.cat([dense_SN, other_SN])
        scale = _inverse_count(len(learned_N), weight_N, num_items_in_batch)
        if not self.training:
            measured = targets[self._measured].known_N
            sums = self._sums(head, other_SN, coded, view.sequence_N, len(labels), measured)
            sums = sums if aligned is None else _with_bytes(sums, aligned)
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
        features: _Features,
        places: tuple[Tensor, Tensor],
    ) -> View:
        """The learned positions of a batch; coded: hidden states by cache and layer; places: sample and
        position of each of its positions.
        """
        learned_N = features.learned_N

        def teacher(store: int, layer: int) -> Tensor:
            parts = coded[store][layer]
            states = {name: features(part) for name, part in parts.items()}
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
            stored_N = features(parts["weight"]) if "weight" in parts else None
            return stored_N if features.boundary_N is None else features.at_boundaries(stored_N)

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
        terms, measured = self.objective.weighted(("head",), self.weights), self._measured
        asked = [
            (
                self._translated_loss(term),
                weight,
                TargetSource(term.teachers, term.shared),
                bool(term.loss.needs),
            )
            for term, weight in terms
        ]
        if not self.training:
            asked += [(forward_kl, 0.0, measured, True), (cross_entropy, 0.0, measured, False)]
        anyone = next((source for *_, source, taught in asked if taught), measured)
        return [
            (function, weight, source if taught else anyone) for function, weight, source, taught in asked
        ]

    def _translated_loss(self, term: Term) -> ReducedLoss:
        """A head term's loss; of a student with another tokenizer, that with the label where there is
        none.
        """
        if self.tokens is None or not term.loss.needs:
            return term.function
        return along_spans if term.loss.spans else where_known(term.function)

    def _spans(
        self, hidden_ND: Tensor, targets: Mapping[TargetSource, SparseTargets], features: _Features
    ) -> Tensor:
        """What `along_spans` reads, float32 [N, 2]; where there is no span, of the cross-entropy itself."""
        output = self.student.get_output_embeddings()
        ce_N = sparse_head_loss(
            hidden_ND=hidden_ND.detach(),
            weight_VD=output.weight.detach(),
            bias_V=None if output.bias is None else output.bias.detach(),
            targets=next(iter(targets.values())),
            terms=[(cross_entropy, 0.0)],
            transform=self.transform,
        ).terms_SN[0]
        return features.span_losses(ce_N)

    @property
    def _measured(self) -> TargetSource:
        """What held-out metrics compare with."""
        return TargetSource(self.objective.measured, self.objective.measures_shared)

    def _targets(
        self,
        wanted: Iterable[TargetSource],
        label_N: Tensor,
        coded: Mapping[int, Coded],
        sequence_N: Tensor,
        features: _Features,
    ) -> dict[TargetSource, SparseTargets]:
        """The learned positions' targets by the caches of their teachers, mixed where they are several; heads
        of zero columns where the batch carries none.
        """
        labelled = any(Need.LABEL in term.loss.needs for term in self.objective.head)

        def targets(source: TargetSource) -> SparseTargets:
            teachers = source.teachers
            if features.aligned is not None and coded[teachers[0]]:
                assert self.tokens is not None
                return _translated(coded[teachers[0]], label_N, features, self.tokens, source.shared)
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

        return {source: targets(source) for source in wanted}

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
        targets: Mapping[TargetSource, SparseTargets],
        weight_N: Tensor | None,
    ) -> HeadLoss:
        """The terms of `_rows`; the head is multiplied once for all that learn from the same teachers."""
        if not rows:  # other terms alone: the head is not even multiplied
            zero = hidden_ND.new_zeros((), dtype=torch.float32)
            return HeadLoss(zero, zero.new_zeros(0, len(hidden_ND)), zero.new_zeros(len(hidden_ND)).bool())
        terms = self.objective.head
        places: dict[TargetSource, list[int]] = {}
        for place, (*_, source) in enumerate(rows):
            places.setdefault(source, []).append(place)
        output = self.student.get_output_embeddings()
        passes = {
            source: sparse_head_loss(
                hidden_ND=hidden_ND,
                weight_VD=output.weight,
                bias_V=output.bias,
                targets=targets[source],
                terms=[rows[place][:2] for place in chosen],
                transform=self.transform,
                reduction=reduction(terms[place] for place in chosen if place < len(terms)),
                scale_N=weight_N,
            )
            for source, chosen in places.items()
        }
        if len(passes) == 1:
            return next(iter(passes.values()))
        values = {
            place: value_N
            for source, chosen in places.items()
            for place, value_N in zip(chosen, passes[source].terms_SN, strict=True)
        }
        return HeadLoss(
            total=torch.stack([one.total for one in passes.values()]).sum(),
            terms_SN=torch.stack([values[place] for place in range(len(rows))]),
            agree_N=passes.get(self._measured, next(iter(passes.values()))).agree_N,
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
        known_N: Tensor | None,
    ) -> Tensor:
        """Per-sequence sums of what evaluation reports, float32 [B, 7]. known_N: where a teacher with another
        tokenizer has a distribution; None for one with the same.
        """
        kl_N, ce_N = head.terms_SN[-2:]
        objective_SN = torch.cat([head.terms_SN[:-2], other_SN])
        weights_S = objective_SN.new_tensor(self.weights)
        ones_N, measured = torch.ones_like(ce_N), self.objective.measured
        has_head = all(coded[store] for store in measured)
        taught_N = ones_N if has_head else torch.zeros_like(ones_N)
        nll_N = -self._label_logprobs(coded, measured) if has_head else taught_N
        agree_N = head.agree_N
        if known_N is not None:
            taught_N = known_N.to(ce_N.dtype)
            kl_N, agree_N, nll_N = kl_N * taught_N, agree_N & known_N, torch.zeros_like(taught_N)
        columns = [
            (weights_S.unsqueeze(1) * objective_SN).sum(0),
            kl_N if has_head else taught_N,
            ce_N,
            agree_N,
            nll_N,
            ones_N,
            taught_N,
        ]
        values_N7 = torch.stack([column.to(ce_N.dtype) for column in columns], dim=-1)
        sums = values_N7.new_zeros(sequences, len(EVAL_COLUMNS))
        return sums.index_add_(0, sequence_N, values_N7)


class _Features:
    """Takes what the cache holds of the learned positions, [N, ...]; learned_N: their places in the batch.

    aligned: of a student with another tokenizer, see `RetokenisedCollator`; then features are [B, T, ...] in
    rows of the teacher's. boundary_N: bool [N], where a row of its own ends at the position.
    """

    def __init__(self, learned_N: Tensor, length: int, aligned: Mapping[str, Tensor] | None) -> None:
        self.learned_N, self.aligned = learned_N, aligned
        self.boundary_N: Tensor | None = None
        if aligned is not None:
            self._sample_N = learned_N // length
            self._row_N, self._depth_N, self._actual_N = (
                select(aligned[name], learned_N).long() for name in ("row", "depth", "actual")
            )
            self._known_N = self._row_N >= 0
            self.boundary_N = self._known_N & (self._depth_N == 0)

    def __call__(self, part: Tensor) -> Tensor:
        if self.aligned is None:
            return select(part, self.learned_N)
        return select(part, self._sample_N * part.shape[1] + self._row_N.clamp_min(0))

    def at_boundaries(self, weight_N: Tensor | None) -> Tensor:
        """What the loss of each position counts where states of both are compared, float32 [N]."""
        assert self.boundary_N is not None
        boundary_N = self.boundary_N.float()
        return boundary_N if weight_N is None else boundary_N * weight_N

    def span_losses(self, ce_N: Tensor) -> Tensor:
        """(value, derivative with respect to the cross-entropy) at each position, float32 [N, 2]."""
        assert self.aligned is not None
        length = self.aligned["span"].shape[1]
        span_N, nats_N = (select(self.aligned[name], self.learned_N) for name in ("span", "span_logprob"))
        inside_N, first_N = span_N >= 0, ~torch.isnan(nats_N) & (span_N >= 0)
        place_N = self._sample_N * length + span_N.clamp_min(0)
        sums_G = ce_N.new_zeros(len(self.aligned["span"]) * length)
        with torch.enable_grad():
            leaf_N = ce_N.detach().requires_grad_()
            log_q_G = sums_G.index_add(0, place_N, -leaf_N * inside_N)
            log_p_G = sums_G.index_add(0, place_N, torch.where(first_N, nats_N, 0.0).to(ce_N.dtype))
            value_N = torch.where(first_N, outcome_kl(log_q_G, log_p_G)[place_N], 0.0)
            (slope_N,) = torch.autograd.grad(value_N.sum(), leaf_N)
        # A label that is in no span is learned as such.
        return torch.where(
            inside_N.unsqueeze(-1),
            torch.stack([value_N.detach(), slope_N], -1),
            torch.stack([ce_N, torch.ones_like(ce_N)], -1),
        )

    def following(self, logprob_N: Tensor) -> NextTokens:
        """What comes next; logprob_N: of the teacher's next token in the rows that are read."""
        return NextTokens(
            known_N=self._known_N, depth_N=self._depth_N, actual_N=self._actual_N, logprob_N=logprob_N
        )


def _translated(
    coded: Coded, label_N: Tensor, features: _Features, tokens: DeviceMap, shared: bool
) -> SparseTargets:
    """The targets of a teacher with another tokenizer, over the student's tokens."""
    following = features.following(decode_labels(coded["label_logprob"]))
    tables = tokens.to(label_N.device)
    if not shared:
        return first_tokens(decode_targets(coded, label_N), following, tables)
    head = {name: part for name, part in coded.items() if name not in ("draws", "repeats", "entropy")}
    return shared_tokens(decode_targets(head, label_N), following, tables)


def _with_bytes(sums: Tensor, aligned: Mapping[str, Tensor]) -> Tensor:
    """BYTE_COLUMNS behind the sums, and the teacher's nats in theirs where they are known."""
    bytes_B = aligned["label_bytes"].sum(-1).to(sums.dtype)
    teacher_B2 = aligned.get("teacher", torch.zeros(len(sums), 2, device=sums.device)).to(sums.dtype)
    sums[:, EVAL_COLUMNS.index("teacher_nll")] = teacher_B2[:, 0]
    return torch.cat([sums, bytes_B.unsqueeze(-1), teacher_B2[:, 1:]], -1)


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
