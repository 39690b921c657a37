"""Which texts a request asks for, which are missing, and what becomes of them. Pure functions.

T tokens of a prompt, S of a text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from featurestore.format.schema import Sample, joined
from featurestore.format.written import Key, WriterSpec, prompt_id
from featurestore.identity import digest

Array = npt.NDArray[Any]

_SEED_DOMAIN = b"distily-cache continuation v1\0"


@dataclass(frozen=True, eq=False)
class WritingJob:
    """One text of a request: its key, the prompt that it goes on from (int32 [T]), and the keys of the
    documents that begin with the prompt.
    """

    key: Key
    prompt: Array
    documents: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class WritingPlan:
    """The texts of a request, by prompt and then by number, and those that are written (int32 [S])."""

    spec: WriterSpec
    jobs: tuple[WritingJob, ...]
    found: Mapping[Key, Array]
    shard_tokens: int

    @cached_property
    def pieces(self) -> list[list[WritingJob]]:
        """What is missing, in pieces that are written and kept together.

        They are cut before what is there is taken out, so that a request that was interrupted goes on with
        the very pieces that it had, and each text stands in the batch where it would have stood.
        """
        groups = split_jobs(self.jobs, self.spec.max_tokens, self.shard_tokens)
        left = ([job for job in group if job.key not in self.found] for group in groups)
        return [group for group in left if group]

    @property
    def missing(self) -> int:
        """How many texts are left to write."""
        return sum(map(len, self.pieces))

    @cached_property
    def samples(self) -> dict[Key, Sample]:
        """The samples that the written texts make, in order."""
        return {
            job.key: sample_of(job.prompt, self.found[job.key], job.documents)
            for job in self.jobs
            if job.key in self.found
        }

    def samples_by_id(self) -> dict[str, Sample]:
        """The same by sample id: texts that came out alike are one sample, of all their documents."""
        alike: dict[str, list[Sample]] = {}
        for sample in self.samples.values():
            alike.setdefault(sample.id, []).append(sample)
        return {
            name: replace(found[0], documents=joined(one.documents for one in found))
            for name, found in alike.items()
        }

    def extents(self) -> list[tuple[str, int]]:
        """(sample id, length) of every text. A missing one has an id of its own, and its greatest length."""
        made = {key: (sample.id, len(sample)) for key, sample in self.samples.items()}
        return [made.get(job.key) or self._unwritten(job) for job in self.jobs]

    def _unwritten(self, job: WritingJob) -> tuple[str, int]:
        name = digest(b"not written yet\0" + repr(job.key).encode())
        return name, len(job.prompt) + self.spec.max_tokens


def prompts_of(samples: Iterable[Sample], prompt_tokens: int) -> list[Array]:
    """The first `prompt_tokens` tokens of each sample, each prompt once."""
    cut = (sample.tokens[:prompt_tokens] for sample in samples)
    return list({prompt_id(tokens): tokens for tokens in cut}.values())


def documents_of(samples: Iterable[Sample], prompt_tokens: int) -> dict[str, tuple[str, ...]]:
    """Prompt id -> keys of all documents that the prompt, as in `prompts_of`, is the beginning of."""
    found: dict[str, list[tuple[str, ...]]] = {}
    for sample in samples:
        found.setdefault(prompt_id(sample.tokens[:prompt_tokens]), []).append(sample.documents)
    return {name: joined(keys) for name, keys in found.items()}


def jobs_of(
    prompts: Iterable[Array], continuations: int, documents: Mapping[str, tuple[str, ...]] | None = None
) -> tuple[WritingJob, ...]:
    """`continuations` texts of every prompt; documents: see `documents_of`."""
    named = ((prompt_id(prompt), prompt) for prompt in prompts)
    return tuple(
        WritingJob((name, number), prompt, (documents or {}).get(name, ()))
        for name, prompt in named
        for number in range(continuations)
    )


def split_jobs(jobs: Sequence[WritingJob], max_tokens: int, shard_tokens: int) -> list[list[WritingJob]]:
    """Cut jobs, in order, into pieces of at most `shard_tokens` positions, prompts included; at least one."""
    pieces: list[list[WritingJob]] = []
    room = 0
    for job in jobs:
        size = len(job.prompt) + max_tokens
        if not pieces or size > room:
            pieces.append([])
            room = shard_tokens
        pieces[-1].append(job)
        room -= size
    return pieces


def seed_of(seed: int, key: Key) -> int:
    """The seed of one text, in [0, 2**63): whatever else is written beside it, and in which order."""
    name, number = key
    data = _SEED_DOMAIN + seed.to_bytes(8, "little") + name.encode() + number.to_bytes(8, "little")
    return int.from_bytes(blake3(data).digest(8), "little") >> 1


def sample_of(prompt: Array, text: Array, documents: tuple[str, ...] = ()) -> Sample:
    """Prompt (int32 [T]) and text (int32 [S]) as one sample, of which the text alone is learned."""
    mask = np.arange(len(prompt) + len(text)) >= len(prompt)
    return Sample(tokens=np.concatenate([prompt, text]), loss_mask=mask, documents=documents)


def cut_at_end(tokens: Sequence[int], ends: Iterable[int]) -> Array:
    """int32 [S]: up to the first of `ends`, which belongs to the text."""
    stops = set(ends)
    last = next((place for place, token in enumerate(tokens) if token in stops), len(tokens) - 1)
    return np.asarray(tokens[: last + 1], dtype=np.int32)
