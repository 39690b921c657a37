"""Samples in the tokens of a student whose tokenizer is not the teacher's, and batches of them.

The teacher's features stay in rows of its own tokens; each position of the student says which of them it
reads.

Shape letters: B batch, S positions of the student, T positions of the teacher.
"""

# ruff: noqa: N815  (shape suffixes on dataclass fields)
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from featurestore.format.codec import decode_labels
from featurestore.format.schema import GroupSpec, LogitsSpec
from featurestore.reader import CacheReader, CodedSample
from student.alignment.retokenise import Counts, Retokeniser
from student.alignment.vocabulary import Vocabulary
from student.data.batches import (
    IGNORE,
    Array,
    CachedDataset,
    Collator,
    codes_of,
    next_labels,
    pad,
)
from student.data.measures import Curriculum
from student.data.token_map import TokenMap
from student.errors import UserError


@dataclass(frozen=True, eq=False, kw_only=True)
class RetokenisedSample(CodedSample):
    """A sample in the student's tokens. given: as the cache has it, with the teacher's features. At position
    s, row_S: int32, the teacher's position that knows what comes next, -1 where none does; depth_S: int32,
    how many of the student's tokens have been read since; actual_S: int32, the teacher's next token. bytes_S:
    int32, of each token. counts: what was aligned, and lost. boundaries_A2: see `student.alignment.spans`.
    """

    given: CodedSample
    row_S: Array
    depth_S: Array
    actual_S: Array
    bytes_S: Array
    counts: Counts
    boundaries_A2: Array


@dataclass(frozen=True, eq=False, kw_only=True)
class OtherTokens:
    """How samples become those of a student: the two vocabularies, what cuts texts, and the map of tokens.
    digest: of the student's tokenizer. longest: tokens of a sample that the student takes; None for any.
    """

    teacher: Vocabulary
    student: Vocabulary
    retokenise: Retokeniser
    tokens: TokenMap
    digest: str
    longest: int | None = None

    def __call__(self, given: CodedSample) -> RetokenisedSample:
        """The sample in the student's tokens."""
        learned_T = given.loss_mask.copy()
        learned_T[:1] = False  # nothing predicts the first token, nor any part of it
        made = self.retokenise(given.tokens, learned_T)
        if self.longest is not None and len(made.ids_S) > self.longest:
            raise UserError(
                f"the student takes {self.longest} positions, and sample {given.id} has {len(made.ids_S)} of "
                "its tokens; raise max_position_embeddings or generate a cache with a smaller --max-seq-len"
            )
        row_S, depth_S, actual_S = rows(made.alignment.boundaries_A2, given.tokens, made.ids_S, self.tokens)
        return RetokenisedSample(
            id=given.id,
            tokens=made.ids_S.astype(np.int32),
            loss_mask=made.loss_mask_S,
            features={},
            documents=given.documents,
            given=replace(given, loss_mask=learned_T),
            row_S=row_S,
            depth_S=depth_S,
            actual_S=actual_S,
            bytes_S=self.student_bytes[made.ids_S].astype(np.int32),
            counts=made.counts,
            boundaries_A2=made.alignment.boundaries_A2,
        )

    @cached_property
    def student_bytes(self) -> Array:
        """int64 [V]: bytes of each of the student's tokens; 0 of special ones."""
        return _sizes(self.student)

    @cached_property
    def teacher_bytes(self) -> Array:
        """int64 [V]: of the teacher's."""
        return _sizes(self.teacher)

    @cached_property
    def unwritten(self) -> Array:
        """bool [V]: special tokens of the teacher that the student has none for."""
        found = np.zeros(len(self.teacher.texts), bool)
        found[list(self.teacher.roles)] = True
        found[list(self.retokenise.specials)] = False
        return found


def _sizes(vocabulary: Vocabulary) -> Array:
    return np.array([len(text) for text in vocabulary.texts], np.int64)


def rows(
    boundaries_A2: Array, teacher_T: Array, student_S: Array, tokens: TokenMap
) -> tuple[Array, Array, Array]:
    """(row, depth, actual next token of the teacher) of each position of the student, int32 [S] each, as
    `RetokenisedSample` has them.

    A position reads the teacher's last row before which the same text was read. Between two boundaries it
    reads on in that row, as long as what was read begins the teacher's next token, cut as the token map does.
    """
    size = len(student_S)
    row_S = np.full(size, -1, np.int32)
    depth_S, actual_S = np.zeros(size, np.int32), np.zeros(size, np.int32)
    inside = (boundaries_A2 >= 0).all(1) if len(boundaries_A2) else np.zeros(0, bool)
    teacher_A, student_A = boundaries_A2[inside].T
    teacher_A, student_A = teacher_A.astype(np.int64), student_A.astype(np.int64)
    # Of the same position of the student, the last row counts: what is between are tokens that it lacks.
    last_A = np.ones(len(student_A), bool)
    last_A[:-1] = student_A[1:] != student_A[:-1]
    teacher_A, student_A = teacher_A[last_A], student_A[last_A]
    if not len(student_A):
        return row_S, depth_S, actual_S
    place_S = np.searchsorted(student_A, np.arange(size), side="right") - 1
    begun_S = place_S >= 0
    start_S = student_A[np.maximum(place_S, 0)]
    from_S = teacher_A[np.maximum(place_S, 0)]
    begun_S &= from_S + 1 < len(teacher_T)
    next_S = teacher_T[np.minimum(from_S + 1, len(teacher_T) - 1)].astype(np.int64)
    read_S = np.where(begun_S, np.arange(size) - start_S, 0)
    width = tokens.pieces_VL.shape[1]
    begun_S &= read_S < width
    # Inside a token: every piece since the boundary is that of the token's own text, and one is left.
    piece_S = tokens.pieces_VL[next_S, np.clip(read_S - 1, 0, width - 1)]
    wrong_S = (read_S > 0) & (piece_S != student_S)
    wrongs_S = np.cumsum(wrong_S)
    begun_S &= wrongs_S == wrongs_S[start_S]
    begun_S &= (read_S == 0) | (read_S < tokens.counts_V[next_S])
    row_S[begun_S] = from_S[begun_S]
    depth_S[begun_S] = read_S[begun_S]
    actual_S[begun_S] = next_S[begun_S]
    return row_S, depth_S, actual_S


def span_likelihoods(sample: RetokenisedSample, logprob_T: Array, unwritten_V: Array) -> tuple[Array, Array]:
    """(number of the span that the token behind each position lies in, int32 [S], -1 for none; the teacher's
    log-likelihood of it, float32 [S], at the first position of a span, NaN elsewhere).

    A span is what lies between two neighbouring boundaries, where both have learned all of it, and each token
    of the teacher in it means something to the student.

    logprob_T: float [T], the teacher's of the token behind each position.
    """
    given, size = sample.given, len(sample.tokens)
    span_S, logprob_S = np.full(size, -1, np.int32), np.full(size, np.nan, np.float32)
    pairs_A2 = sample.boundaries_A2
    if len(pairs_A2) < 2:
        return span_S, logprob_S
    known_T = given.loss_mask & ~unwritten_V[given.tokens]
    # Sums over the tokens in front of each: known ones, what the teacher gave them, what the student learns.
    known_T1 = np.concatenate([[0], np.cumsum(known_T)])
    spent_T = np.where(known_T[1:], logprob_T[:-1], 0.0).astype(np.float64)
    nats_T1 = np.concatenate([[0.0, 0.0], np.cumsum(np.nan_to_num(spent_T))])
    lost_T1 = np.concatenate([[0, 0], np.cumsum(np.isnan(spent_T))])
    learned_S1 = np.concatenate([[0], np.cumsum(sample.loss_mask)])
    begin_A, start_A = pairs_A2[:-1].T + 1
    end_A, stop_A = pairs_A2[1:].T + 1
    whole_A = (known_T1[end_A] - known_T1[begin_A] == end_A - begin_A) & (end_A > begin_A)
    whole_A &= (learned_S1[stop_A] - learned_S1[start_A] == stop_A - start_A) & (stop_A > start_A)
    whole_A &= lost_T1[end_A] == lost_T1[begin_A]
    # The spans follow each other without a gap.
    number_S = np.repeat(np.where(whole_A, np.arange(len(begin_A)), -1), stop_A - start_A)
    span_S[start_A[0] - 1 : stop_A[-1] - 1] = number_S
    logprob_S[start_A[whole_A] - 1] = (nats_T1[end_A] - nats_T1[begin_A])[whole_A]
    return span_S, logprob_S


class RetokenisedDataset(CachedDataset):
    """Samples of a cache in the student's tokens, which are made as they are read."""

    def __init__(
        self,
        reader: CacheReader,
        indices: Sequence[int],
        groups: Sequence[GroupSpec],
        other: OtherTokens,
        curriculum: Curriculum | None = None,
    ) -> None:
        super().__init__(reader, indices, groups, curriculum)
        self.other = other

    def record(self) -> dict[str, Any]:
        """What is read, for checkpoints."""
        return super().record() | {"tokenizer": self.other.digest}

    def __getitem__(self, index: int) -> RetokenisedSample:
        """Sample `index`; for ~index the same one with nothing to learn."""
        sample = super().__getitem__(index)
        assert isinstance(sample, RetokenisedSample)
        return sample

    def _sample(self, index: int) -> RetokenisedSample:
        return self.other(super()._sample(index))


class RetokenisedCollator(Collator):
    """Lays out samples in the student's tokens: input_ids, attention_mask and labels are the student's [B,
    S], the features the teacher's [B, T].

    aligned: row, depth, actual int32 [B, S] as of `RetokenisedSample`, and label_bytes int32 [B, S], 0 where
    nothing is learned; for distributions also span and span_logprob as of `span_likelihoods`, and teacher
    float32 [B, 2]: minus the log-probability that the
    teacher gives the learned tokens of the sample together, in nats (NaN where it is not known), and their
    bytes.
    """

    def __init__(
        self, groups: Sequence[GroupSpec], other: OtherTokens, pad_token: int, drop_idle: bool = False
    ) -> None:
        super().__init__(groups, pad_token, drop_idle=drop_idle)
        self._distribution = next((group for group in groups if isinstance(group, LogitsSpec)), None)
        self._teacher_bytes, self._unwritten = other.teacher_bytes, other.unwritten

    def _padded(self, samples: Sequence[CodedSample]) -> dict[str, Any]:
        made = [sample for sample in samples if isinstance(sample, RetokenisedSample)]
        assert len(made) == len(samples)
        features = super()._padded([sample.given for sample in made])
        lengths = np.array([len(sample.tokens) for sample in made])
        length = int(lengths.max())
        input_ids = pad([sample.tokens for sample in made], length, np.int64, self._pad_token)
        learned = pad([sample.loss_mask for sample in made], length, np.bool_)
        labels = next_labels(input_ids, learned)
        bytes_BS = pad([sample.bytes_S for sample in made], length, np.int32).roll(-1, 1)
        aligned = {
            "row": pad([sample.row_S for sample in made], length, np.int32, -1),
            "depth": pad([sample.depth_S for sample in made], length, np.int32),
            "actual": pad([sample.actual_S for sample in made], length, np.int32),
            "label_bytes": bytes_BS.masked_fill(labels == IGNORE, 0),
        }
        if self._distribution is not None:
            spent = [self._spent(sample.given, self._distribution) for sample in made]
            aligned["teacher"] = pad(spent, 2, np.float32)
            spans, nats = zip(*(self._spans(sample, self._distribution) for sample in made), strict=True)
            aligned["span"] = pad(spans, length, np.int32, -1)
            aligned["span_logprob"] = pad(nats, length, np.float32)
        coded: dict[str, Any] = {name: part for name, part in features.items() if name.startswith("coded_")}
        return {
            "input_ids": input_ids,
            "attention_mask": pad([np.ones(size, np.int64) for size in lengths], length, np.int64),
            "labels": labels,
            **coded,
            "aligned": aligned,
        }

    def _spans(self, sample: RetokenisedSample, group: LogitsSpec) -> tuple[Array, Array]:
        codes = codes_of(sample.given, group)
        assert codes is not None
        return span_likelihoods(sample, decode_labels(codes.label_logprob), self._unwritten)

    def _spent(self, given: CodedSample, group: LogitsSpec) -> Array:
        codes = codes_of(given, group)
        assert codes is not None
        learned = np.flatnonzero(given.loss_mask[1:])
        nats = -decode_labels(codes.label_logprob)[learned].astype(np.float64).sum()
        return np.array([nats, self._teacher_bytes[given.tokens[learned + 1]].sum()])
