"""Planning of written texts, for any request: nothing twice, nothing forgotten, whatever is there already."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featurestore.format.schema import Sample
from featurestore.format.written import WriterSpec, prompt_id
from pipeline.writing.plan import (
    WritingJob,
    WritingPlan,
    cut_at_end,
    jobs_of,
    prompts_of,
    sample_of,
    seed_of,
    split_jobs,
)

MAX_TOKENS = 5
SPEC = WriterSpec(
    digest="ab" * 32,
    engine="transformers",
    dtype="float32",
    temperature=1.0,
    top_p=1.0,
    max_tokens=MAX_TOKENS,
    seed=0,
    ends=(2,),
)
PROMPTS = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), max_size=12, unique_by=tuple)


def int32(*tokens: int) -> np.ndarray:
    return np.array(tokens, dtype=np.int32)


def plan_of(prompts: list[list[int]], count: int, written: set[int], shard_tokens: int) -> WritingPlan:
    """A plan in which the texts at the places `written` are there."""
    jobs = jobs_of([int32(*prompt) for prompt in prompts], count)
    found = {job.key: int32(7, place) for place, job in enumerate(jobs) if place in written}
    return WritingPlan(SPEC, jobs, found, shard_tokens)


@given(PROMPTS, st.integers(1, 4), st.sets(st.integers(0, 47)), st.integers(1, 60))
def test_pieces_hold_what_is_missing_once(
    prompts: list[list[int]], count: int, written: set[int], shard_tokens: int
) -> None:
    plan = plan_of(prompts, count, written, shard_tokens)
    keys = [job.key for piece in plan.pieces for job in piece]
    assert keys == [job.key for job in plan.jobs if job.key not in plan.found]
    assert len(keys) == len(set(keys)) == plan.missing and all(plan.pieces)
    for piece in plan.pieces:
        assert len(piece) == 1 or sum(len(job.prompt) + MAX_TOKENS for job in piece) <= shard_tokens


@given(PROMPTS, st.integers(1, 4), st.integers(1, 60), st.data())
def test_a_run_that_was_killed_goes_on_with_the_same_pieces(
    prompts: list[list[int]], count: int, shard_tokens: int, data: st.DataObject
) -> None:
    whole = plan_of(prompts, count, set(), shard_tokens)
    kept = data.draw(st.sets(st.integers(0, max(0, len(whole.pieces) - 1))))
    found = {job.key: int32(4) for i, piece in enumerate(whole.pieces) if i in kept for job in piece}
    rest = WritingPlan(SPEC, whole.jobs, found, shard_tokens)
    names = [[job.key for job in piece] for piece in whole.pieces]
    assert [[job.key for job in piece] for piece in rest.pieces] == [
        name for i, name in enumerate(names) if i not in kept
    ]


@given(PROMPTS, st.integers(1, 3), st.integers(0, 3), st.integers(0, 11))
def test_a_larger_request_keeps_every_text_of_a_smaller_one(
    prompts: list[list[int]], count: int, more: int, fewer: int
) -> None:
    small = {job.key: seed_of(3, job.key) for job in plan_of(prompts[:fewer], count, set(), 50).jobs}
    large = {job.key: seed_of(3, job.key) for job in plan_of(prompts, count + more, set(), 50).jobs}
    assert small.items() <= large.items()
    assert len(set(large.values())) == len(large) == len(prompts) * (count + more)
    assert all(0 <= seed < 2**63 for seed in large.values())
    assert not {seed_of(4, key) for key in large} & set(large.values())


@given(PROMPTS, st.integers(1, 3), st.sets(st.integers(0, 35)))
def test_extents_are_the_samples_and_bounds_for_the_rest(
    prompts: list[list[int]], count: int, written: set[int]
) -> None:
    plan = plan_of(prompts, count, written, 20)
    extents = plan.extents()
    assert len(extents) == len(plan.jobs) and len({name for name, _ in extents}) == len(extents)
    for job, (name, length) in zip(plan.jobs, extents, strict=True):
        if job.key in plan.found:
            assert (name, length) == (plan.samples[job.key].id, len(job.prompt) + 2)
        else:
            assert length == len(job.prompt) + MAX_TOKENS
    assert list(plan.samples) == [job.key for job in plan.jobs if job.key in plan.found]


@given(st.lists(st.integers(0, 9), min_size=1), st.lists(st.integers(0, 9), min_size=1))
def test_what_was_written_is_learned_and_nothing_else(prompt: list[int], text: list[int]) -> None:
    sample = sample_of(int32(*prompt), int32(*text))
    assert sample.tokens.tolist() == prompt + text
    assert sample.tokens[sample.loss_mask].tolist() == text
    assert sample.tokens[~sample.loss_mask].tolist() == prompt


@given(st.lists(st.integers(0, 9), min_size=1), st.sets(st.integers(0, 9)))
def test_a_text_ends_with_its_first_end(tokens: list[int], ends: set[int]) -> None:
    text = cut_at_end(tokens, ends).tolist()
    assert text == tokens[: len(text)] and text
    assert not ends & set(text[:-1])
    assert text[-1] in ends or text == tokens


def test_prompts_are_cut_and_none_is_taken_twice() -> None:
    samples = [
        Sample(int32(*tokens), np.ones(len(tokens), np.bool_)) for tokens in ([1, 2, 3, 4], [1, 2, 9], [5])
    ]
    assert [prompt.tolist() for prompt in prompts_of(samples, 2)] == [[1, 2], [5]]


def test_the_spelling_of_ids_and_seeds_does_not_change() -> None:
    """They name what is in people's stores."""
    key = (prompt_id(int32(1, 2, 3)), 4)
    assert key[0] == "2acc7bcc28b1bf53a54da3b53e289333"
    assert seed_of(5, key) == 1253917604328029041
    assert SPEC.id == "a15ab497d528d760ae1cc6bdd09c87d4"


def test_one_job_larger_than_a_piece_is_a_piece_alone() -> None:
    jobs = [WritingJob(("a", n), int32(*range(n))) for n in (1, 30, 1)]
    assert [len(piece) for piece in split_jobs(jobs, 5, 12)] == [1, 1, 1]
    with pytest.raises(ValueError, match="at least one"):
        sample_of(int32(), int32())
