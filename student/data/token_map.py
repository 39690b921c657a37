"""What a teacher's tokens are to a student with another tokenizer, and its distributions over their tokens.

Two ways lead from a distribution over the teacher's tokens to one over the student's:

- *first tokens*: a token y stands for its text, and the student will begin that text with one certain token.
  The probability of a student's token is then the sum over all y whose text begins with it, the push-forward
  of Vieira et al., "From Language Models over Tokens to Language Models over Characters" (arXiv:2412.03719)
  and Phan et al. (arXiv:2410.09303). It also exists inside a token: once some of the student's tokens were
  read, the y that begin with these are left, and the next token of each counts. Since the text is cut into
  the teacher's tokens as it is, a token that would have ended where the student stands is none of them.
- *shared tokens*: tokens of the same bytes, or of the same role, keep their probability, as far as the
student writes them so, and all else is the mass outside.

A student's token may also be longer than the teacher's, and depends on what follows y: then y stands for the
tokens that the student read in y's places in the training text, each with its share of these. The y that
really comes next counts for the token that the student really reads, and its probability is known even where
it is in no head.

Shape letters: N positions, K head columns, C columns of targets, V the teacher's vocabulary, L pieces of a
token, R tokens of the student that one may begin.
"""

# ruff: noqa: N815  (shape suffixes on dataclass fields)
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from student.alignment.encoding import TextEncoder
from student.alignment.roles import shared_ids
from student.alignment.vocabulary import Vocabulary
from student.data.columns import PADDING, best_first, first_of_runs, run_sums
from student.losses.sparse import SparseTargets, Tempered

MOST_PIECES = 32  # of a token that are told apart; inside it the labels are learned from there on
MOST_CHOICES = 8  # tokens of the student that one of the teacher's begins
_TINY = 1e-30  # of the actual next token, so that a row is never empty

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenMap:
    """shared_V: int32 [V], the student's token of the same bytes or role, -1 where it has none. pieces_VL:
    int32 [V, L], the student's tokens of a token's text, -1 behind them; counts_V: int32 [V], how many there
    are, those beyond L included, 0 for a token that the student cannot write. prefix_VL: int32 [V, L], equal
    in column d where the first d pieces are; -1 where there are fewer. choices_VR: int32 [V, R], the
    student's tokens that it may begin at a boundary, and shares_VR: float32 [V, R], their shares of it, 1
    together.
    """

    shared_V: Array
    pieces_VL: Array
    counts_V: Array
    prefix_VL: Array
    choices_VR: Array
    shares_VR: Array

    def kept(self) -> Array:
        """float32 [V]: how often the student's token where it began was the shared one, as a share."""
        kept_VR = self.shares_VR * (self.choices_VR == self.shared_V[:, None])
        kept_V: Array = kept_VR.sum(1).astype(np.float32)
        return kept_V

    def with_choices(self, teacher_P: Array, student_P: Array) -> TokenMap:
        """The map with the choices that were made at P places: the student's token where the teacher's began.

        The first piece of a token's text counts as one place more, which is all that there is of a token that
        was not seen.
        """
        written_V = np.flatnonzero(self.counts_V)
        both_P2 = np.concatenate(
            [
                np.stack([teacher_P, student_P], 1).astype(np.int64),
                np.stack([written_V, self.pieces_VL[written_V, 0]], 1),
            ]
        )
        pairs_Q2, count_Q = np.unique(both_P2, axis=0, return_counts=True)
        # By token, the most frequent first; equal ones by the student's id.
        order_Q = np.lexsort((pairs_Q2[:, 1], -count_Q, pairs_Q2[:, 0]))
        (token_Q, choice_Q), count_Q = pairs_Q2[order_Q].T, count_Q[order_Q]
        _, first_Q = np.unique(token_Q, return_index=True)
        rank_Q = np.arange(len(token_Q)) - np.repeat(first_Q, np.diff([*first_Q, len(token_Q)]))
        kept_Q = rank_Q < MOST_CHOICES
        shape = (len(self.counts_V), int(rank_Q[kept_Q].max(initial=0)) + 1)
        choices_VR, shares_VR = np.full(shape, -1, np.int32), np.zeros(shape, np.float32)
        choices_VR[token_Q[kept_Q], rank_Q[kept_Q]] = choice_Q[kept_Q]
        shares_VR[token_Q[kept_Q], rank_Q[kept_Q]] = count_Q[kept_Q]
        shares_VR /= np.maximum(shares_VR.sum(1, keepdims=True), 1)
        return replace(self, choices_VR=choices_VR, shares_VR=shares_VR)


def token_map(
    teacher: Vocabulary, student: Vocabulary, encoder: TextEncoder, size: int | None = None
) -> TokenMap:
    """The map from one vocabulary to another.

    encoder: the student's tokenizer; it cuts the texts of tokens that it does not share. size: outputs of the
    teacher, V, of which those behind its tokenizer's stand for nothing; None for none of these.
    """
    shared_V = shared_ids(teacher, student).astype(np.int32)
    if size is not None and size > len(shared_V):
        shared_V = np.pad(shared_V, (0, size - len(shared_V)), constant_values=-1)
    pieces: list[Sequence[int]] = [(own,) if own >= 0 else () for own in shared_V.tolist()]
    lacking = [
        index
        for index in np.flatnonzero(shared_V < 0).tolist()
        if index < len(teacher.texts) and index not in teacher.roles and teacher.texts[index]
    ]
    cut = _cut([teacher.texts[index] for index in lacking], student, encoder)
    for index, own_pieces in zip(lacking, cut, strict=True):
        pieces[index] = own_pieces
    counts_V = np.array([len(one) for one in pieces], np.int32)
    width = max(1, min(MOST_PIECES, int(counts_V.max(initial=1))))
    pieces_VL = np.full((len(pieces), width), -1, np.int32)
    for row, one in zip(pieces_VL, pieces, strict=True):
        row[: len(one)] = one[:width]
    # Where several of the teacher's are one of the student's, one of them keeps its probability.
    once_V = np.zeros(len(shared_V), bool)
    once_V[np.unique(shared_V, return_index=True)[1]] = True
    return TokenMap(
        shared_V=np.where(once_V, shared_V, -1).astype(np.int32),
        pieces_VL=pieces_VL,
        counts_V=counts_V,
        prefix_VL=_prefixes(pieces_VL),
        choices_VR=pieces_VL[:, :1],
        shares_VR=(counts_V > 0).astype(np.float32)[:, None],
    )


def _cut(texts: Sequence[bytes], student: Vocabulary, encoder: TextEncoder) -> list[Sequence[int]]:
    """The student's tokens of each text; none where it cannot write it to the byte."""
    if bytewise(student):
        return [[student.byte_ids[one] for one in text] for text in texts]
    found: list[Sequence[int]] = []
    for text in texts:
        readable = _decoded(text)
        ids = [] if readable is None else encoder.encode(readable, "inner").ids.tolist()
        found.append(ids if b"".join(student.texts[one] for one in ids) == text else ())
    return found


def bytewise(vocabulary: Vocabulary) -> bool:
    """Whether its tokens are the 256 bytes, and special ones."""
    return all(len(text) <= 1 for text in vocabulary.texts) and min(vocabulary.byte_ids) >= 0


def _decoded(text: bytes) -> str | None:
    try:
        return text.decode()
    except UnicodeDecodeError:  # a part of a character
        return None


def _prefixes(pieces_VL: Array) -> Array:
    """Numbers of the nodes of the tree of all pieces, [V, L]: column d after d of them."""
    prefix_VL = np.zeros_like(pieces_VL)
    for depth in range(1, pieces_VL.shape[1]):
        steps_V2 = np.stack([prefix_VL[:, depth - 1], pieces_VL[:, depth - 1]], 1)
        _, number_V = np.unique(steps_V2, axis=0, return_inverse=True)
        ended_V = pieces_VL[:, depth - 1] < 0
        prefix_VL[:, depth] = np.where(ended_V, -1, number_V.reshape(-1))
    return prefix_VL


@dataclass
class DeviceMap:
    """The tables of a map on the device of a model; no part of it, like `TeacherParts`."""

    shared_V: Tensor
    pieces_VL: Tensor
    counts_V: Tensor
    prefix_VL: Tensor
    choices_VR: Tensor
    shares_VR: Tensor
    kept_V: Tensor

    @classmethod
    def of(cls, made: TokenMap) -> DeviceMap:
        """On the CPU."""
        tables = {field.name: getattr(made, field.name) for field in fields(made)} | {"kept_V": made.kept()}
        return cls(**{name: torch.from_numpy(np.ascontiguousarray(table)) for name, table in tables.items()})

    def to(self, device: torch.device) -> DeviceMap:
        """Move there, once; self."""
        if self.shared_V.device != device:
            for name, table in vars(self).items():
                setattr(self, name, table.to(device))
        return self

    def tensors(self) -> list[Tensor]:
        """What is held."""
        return list(vars(self).values())


@dataclass(frozen=True, kw_only=True)
class NextTokens:
    """What comes next at N positions of a student.

    known_N: bool, whether there is a row of the teacher; depth_N: int64, how many of the student's tokens lie
    between the end of the teacher's context and the position; actual_N: int64, the teacher's token that comes
    next, whose pieces these tokens are; logprob_N: float32, its log-probability, NaN where it is not known.
    """

    known_N: Tensor
    depth_N: Tensor
    actual_N: Tensor
    logprob_N: Tensor


def first_tokens(targets: SparseTargets, following: NextTokens, tables: DeviceMap) -> SparseTargets:
    """The student's next token by a teacher's distributions; where there is none, the label alone.

    targets: over the teacher's tokens, with draws or with whole heads; label_N is the student's. Nothing is
    left outside the columns, each token is in one of them, and the most likely one comes first. There is no
    entropy: what `forward_kl` is then is the KL from these columns, whose constant differs from that of the
    exact distribution.
    """
    head, ids_NK = targets.head_columns, targets.ids_NK
    mass_NK = targets.logprob_NK.exp()
    actual_N1 = following.actual_N.unsqueeze(-1)
    is_actual_NK = ids_NK == actual_N1
    # 1. The actual next token has a column of its own: as the head has it, else as it was stored of the
    # label.
    own_NK = mass_NK.masked_fill(~is_actual_NK, 0.0)
    in_head_N = own_NK[:, :head].sum(-1)
    stored_N = torch.where(following.logprob_N.isnan(), own_NK.sum(-1), following.logprob_N.exp())
    actual_mass_N = torch.where(in_head_N > 0, in_head_N, stored_N).clamp_min(_TINY)
    mass_NK = mass_NK.masked_fill(is_actual_NK | ~following.known_N.unsqueeze(-1), 0.0)
    # 2. Draws other than it share what is left: they are draws from that, so that no estimate is biased.
    drawn_N = mass_NK[:, head:].sum(-1)
    left_N = (1.0 - mass_NK[:, :head].sum(-1) - actual_mass_N).clamp_min(0.0)
    scale_N1 = torch.where(drawn_N > 0, left_N / drawn_N, 0.0).unsqueeze(-1)
    mass_NK = torch.cat([mass_NK[:, :head], mass_NK[:, head:] * scale_N1], -1)
    # 3. What begins with the tokens that were read, by the token that comes next in it; at a boundary, by the
    # tokens that it may begin.
    depth_N1 = following.depth_N.unsqueeze(-1)
    place_NK = ids_NK * tables.pieces_VL.shape[1] + depth_N1
    prefix_N1 = tables.prefix_VL.flatten()[actual_N1 * tables.pieces_VL.shape[1] + depth_N1]
    open_NK = (tables.prefix_VL.flatten()[place_NK] == prefix_N1) & (tables.counts_V[ids_NK] > depth_N1)
    begins_N11 = (depth_N1 == 0).unsqueeze(-1)
    piece_NK1 = tables.pieces_VL.flatten()[place_NK].unsqueeze(-1)
    next_NKR = torch.where(begins_N11, tables.choices_VR[ids_NK], piece_NK1)
    only_R = torch.zeros_like(tables.shares_VR[0])
    only_R[0] = 1.0
    share_NKR = torch.where(begins_N11, tables.shares_VR[ids_NK], only_R * open_NK.unsqueeze(-1))
    mass_NKR = mass_NK.unsqueeze(-1) * share_NKR
    mass_NC = torch.cat([mass_NKR.flatten(1), actual_mass_N.unsqueeze(-1)], -1)
    mass_NC = mass_NC / mass_NC.sum(-1, keepdim=True)
    next_NC = torch.cat([next_NKR.flatten(1).long(), targets.label_N.unsqueeze(-1)], -1)
    ids_NC, mass_NC = merged(next_NC, mass_NC)
    return SparseTargets(
        ids_NK=torch.where(mass_NC > 0, ids_NC, ids_NC[:, :1]),
        logprob_NK=mass_NC.log(),
        tail_N=torch.full_like(actual_mass_N, -torch.inf),
        label_N=targets.label_N,
        known_N=following.known_N,
    )


def merged(ids_NC: Tensor, mass_NC: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of equal ids as one, of their mass together; the others of them get no mass. The one of most
    mass comes first. Added in the order of the columns, so that a GPU rounds as in every run.
    """
    ids_NC, order_NC = ids_NC.masked_fill(mass_NC <= 0, PADDING).sort(dim=-1, stable=True)
    sums_NC = run_sums(mass_NC.gather(-1, order_NC), ids_NC, ids_NC.shape[1])
    sums_NC = sums_NC.masked_fill(~first_of_runs(ids_NC), 0.0)
    ids_NC, sums_NC = best_first(sums_NC, ids_NC, sums_NC)
    return ids_NC, sums_NC


def shared_tokens(targets: SparseTargets, following: NextTokens, tables: DeviceMap) -> SparseTargets:
    """The tokens of the head that the student has as well, and all else outside. Where no row of the teacher
    applies, or it has no shared token, the label alone.

    A token keeps the share of its probability with which the student writes it so, and the one that really
    comes next all or nothing of it, so that the columns are what is known of the student's next token.

    targets: over the teacher's tokens, without draws. ranked_NK has the probabilities of all of the head, in
    descending order.
    """
    assert not targets.draws
    label_N1 = targets.label_N.unsqueeze(-1)
    shared_NK = tables.shared_V[targets.ids_NK].long()
    is_actual_NK = targets.ids_NK == following.actual_N.unsqueeze(-1)
    kept_NK = torch.where(is_actual_NK, shared_NK == label_N1, tables.kept_V[targets.ids_NK])
    known_N1 = (following.known_N & (following.depth_N == 0)).unsqueeze(-1)
    real_NK = (shared_NK >= 0) & torch.isfinite(targets.logprob_NK) & (kept_NK > 0) & known_N1
    known_N1 = known_N1 & real_NK.any(-1, keepdim=True)
    score_NK = (targets.logprob_NK + kept_NK.log()).masked_fill(~real_NK, -torch.inf)
    order_NK = score_NK.sort(dim=-1, descending=True, stable=True).indices
    real_NK, kept_NK = real_NK.gather(-1, order_NK), kept_NK.gather(-1, order_NK)
    ids_NK = shared_NK.gather(-1, order_NK)
    first_N1 = torch.where(known_N1, ids_NK[:, :1], label_N1)

    def restricted(logprob_NK: Tensor, tail_N: Tensor) -> tuple[Tensor, Tensor]:
        sorted_NK = logprob_NK.gather(-1, order_NK)
        given_NK = (sorted_NK + kept_NK.log()).masked_fill(~real_NK, -torch.inf)
        left_NK = torch.where(real_NK, sorted_NK + torch.log1p(-kept_NK), sorted_NK)
        tail = torch.cat([left_NK, tail_N.unsqueeze(-1)], -1).logsumexp(-1)
        alone_N1 = torch.where(known_N1, given_NK[:, :1], 0.0)
        outside = tail.masked_fill(~known_N1.squeeze(-1), -torch.inf)
        return torch.cat([alone_N1, given_NK[:, 1:]], -1), outside

    logprob_NK, tail_N = restricted(targets.logprob_NK, targets.tail_N)
    return replace(
        targets,
        ids_NK=torch.where(real_NK, ids_NK, first_N1),
        logprob_NK=logprob_NK,
        tail_N=tail_N,
        known_N=known_N1.squeeze(-1),
        ranked_NK=targets.logprob_NK,
        tempered={
            temperature: Tempered(*restricted(at.logprob_NK, at.tail_N))
            for temperature, at in targets.tempered.items()
        },
    )
