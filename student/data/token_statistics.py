"""What is aligned between a teacher's tokens and a student's, and what is not, on some samples of a cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from featurestore.format.schema import LogitsSpec
from featurestore.reader import CacheReader, CodedSample
from student.alignment.retokenise import Counts
from student.data.batches import Array, Collator
from student.data.decoding import decode_targets
from student.data.retokenised import OtherTokens

SAMPLES, CHOICE_SAMPLES = 64, 512


@dataclass(frozen=True, kw_only=True)
class TokenStatistics:
    """Of `samples` training samples. counts: see `student.alignment.retokenise.Counts`.

    learned: the student's learned tokens. boundary, inside, labels: shares of the positions that predict them
    at which the same text was read, that lie inside the teacher's next token, and that have no distribution.
    shared_tokens: the teacher's tokens that the student has as well, and written_tokens those whose text it
    can write; shared_mass, written_mass: the shares of the stored probability on these, None where there is
    none.
    """

    samples: int
    counts: Counts
    learned: int
    boundary: float
    inside: float
    labels: float
    shared_tokens: int
    written_tokens: int
    shared_mass: float | None
    written_mass: float | None

    @property
    def expansion(self) -> float:
        """The student's tokens for each of the teacher's."""
        return self.counts.student_tokens / max(self.counts.teacher_tokens, 1)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "expansion": round(self.expansion, 4)}

    def __str__(self) -> str:
        counts = self.counts
        lost = counts.undecodable_bytes + counts.changed_bytes
        note = " (bits per byte of both do not compare where many are)" if lost else ""
        turns = f"; turns opened as in the student's template: {counts.turns:,}" if counts.turns else ""
        mass = (
            ""
            if self.shared_mass is None
            else f"; {self.shared_mass:.1%} of the teacher's mass is on tokens that both have, "
            f"{self.written_mass:.2%} on tokens whose text the student can write"
        )
        return (
            f"the student has a tokenizer of its own: on {self.samples} samples {counts.teacher_tokens:,} "
            f"tokens of the teacher are {counts.student_tokens:,} of the student; of {self.learned:,} "
            f"learned tokens {self.boundary:.1%} follow a boundary of both, {self.inside:.1%} lie inside the "
            f"teacher's next token, {self.labels:.1%} have their label alone{mass}; bytes lost: {lost:,} of "
            f"{counts.text_bytes:,}{note}; special tokens: {counts.specials_mapped:,} mapped, "
            f"{counts.specials_as_text:,} as text, {counts.specials_dropped:,} dropped{turns}"
        )


def with_choices(reader: CacheReader, training: Sequence[int], other: OtherTokens) -> OtherTokens:
    """With the student's tokens that were read where a token of the teacher's began, in CHOICE_SAMPLES of the
    training samples: those of the smallest ids.
    """
    teacher: list[Array] = [np.zeros(0, np.int64)]
    student: list[Array] = [np.zeros(0, np.int64)]
    for index in reader.catalogue.smallest(CHOICE_SAMPLES, training):
        sample = other(reader.read_codes(index, []))
        begins_S = (sample.row_S[:-1] >= 0) & (sample.depth_S[:-1] == 0)
        begins_S &= sample.loss_mask[1:]
        teacher.append(sample.actual_S[:-1][begins_S])
        student.append(sample.tokens[1:][begins_S])
    tokens = other.tokens.with_choices(np.concatenate(teacher), np.concatenate(student))
    return replace(other, tokens=tokens)


def token_statistics(
    reader: CacheReader, training: Sequence[int], other: OtherTokens, spec: LogitsSpec | None
) -> TokenStatistics:
    """Of the training samples with the smallest ids, which are hashes, so that no order matters.

    spec: the distribution whose mass is looked at.
    """
    groups = [] if spec is None else [spec]
    indices = list(reader.catalogue.smallest(SAMPLES, training))
    counts, found = Counts(), np.zeros(3, np.int64)
    mass = np.zeros(3)
    for index in indices:
        given = reader.read_codes(index, groups)
        sample = other(given)
        counts += sample.counts
        known_S, inside_S = sample.row_S[:-1] >= 0, sample.depth_S[:-1] > 0
        learned_S = sample.loss_mask[1:]
        shares = (known_S & ~inside_S, known_S & inside_S, ~known_S)
        found += [int((share & learned_S).sum()) for share in shares]
        if spec is not None:
            mass += _mass(given, spec, other)
    learned, total = int(found.sum()), max(int(found.sum()), 1)
    return TokenStatistics(
        samples=len(indices),
        counts=counts,
        learned=learned,
        boundary=found[0] / total,
        inside=found[1] / total,
        labels=found[2] / total,
        shared_tokens=int((other.tokens.shared_V >= 0).sum()),
        written_tokens=int((other.tokens.counts_V > 0).sum()),
        shared_mass=float(mass[0] / mass[2]) if mass[2] else None,
        written_mass=float(mass[1] / mass[2]) if mass[2] else None,
    )


def _mass(given: CodedSample, spec: LogitsSpec, other: OtherTokens) -> tuple[float, float, float]:
    """The probability at learned positions on shared tokens, on tokens that can be written, and all of it."""
    batch = Collator([spec], 0)([given])
    coded = {name: part[0] for name, part in batch["coded_head"].items()}
    targets = decode_targets(coded, batch["labels"][0])
    learned_T1 = (batch["labels"][0] >= 0).unsqueeze(-1)
    mass_TK = targets.logprob_NK.exp().double() * learned_T1
    shared_V = torch.from_numpy(other.tokens.shared_V >= 0)
    written_V = torch.from_numpy(other.tokens.counts_V > 0)
    return (
        float((mass_TK * shared_V[targets.ids_NK]).sum()),
        float((mass_TK * written_V[targets.ids_NK]).sum()),
        float(mass_TK.sum()),
    )
