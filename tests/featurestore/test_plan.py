"""Planning covers every wanted row exactly once and never plans what a store serves already."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featurestore.format.kinds.table import covers
from featurestore.format.plan import Task, plan_generation, split_tasks
from featurestore.format.schema import GroupSpec, HiddenSpec, LogitsSpec, group_id

GROUPS: list[GroupSpec] = [
    LogitsSpec(8),
    LogitsSpec(50),
    LogitsSpec(50, 0.9),
    HiddenSpec(1, "bf16"),
    HiddenSpec(2, "int8"),
]
samples = st.lists(st.tuples(st.integers(0, 40).map(lambda i: f"{i:032x}"), st.just(0)), max_size=60).map(
    lambda pairs: [(i, 1 + int(i, 16) % 7) for i, _ in pairs]
)


@given(st.lists(st.integers(1, 50), max_size=50), st.integers(1, 60))
def test_split_keeps_order_and_respects_the_limit(lengths: list[int], limit: int) -> None:
    wanted = [(f"{i:032x}", n) for i, n in enumerate(lengths)]
    tasks = split_tasks(wanted, limit)
    assert [pair for t in tasks for pair in zip(t.sample_ids, t.lengths, strict=True)] == wanted
    assert all(t.rows <= limit or len(t.lengths) == 1 for t in tasks)


@given(
    samples,
    samples,
    st.lists(st.sampled_from(GROUPS), max_size=3),
    st.lists(st.sampled_from(GROUPS), min_size=1),
    st.data(),
)
@settings(max_examples=150, deadline=None)
def test_every_wanted_sample_and_group_is_planned_or_served(
    before: list[tuple[str, int]],
    wanted: list[tuple[str, int]],
    old: list[GroupSpec],
    groups: list[GroupSpec],
    data: st.DataObject,
) -> None:
    known = {t.id: t for t in split_tasks(dict(before).items(), 12)}
    committed = {group_id(g): {t for t in known if data.draw(st.booleans())} for g in old}
    committed["samples"] = {t for t in known if data.draw(st.booleans())}
    specs = {group_id(g): g for g in old}
    plan = plan_generation(
        known_tasks=known,
        committed=committed,
        committed_specs=specs,
        wanted=wanted,
        groups=groups,
        shard_tokens=12,
    )
    assert plan.samples_total == len(dict(wanted)) and plan.duplicates == len(wanted) - plan.samples_total

    tasks = {**known, **{t.id: t for t in plan.new_tasks}}
    places = [s for t in tasks.values() for s in t.sample_ids]
    assert len(places) == len(set(places)), "no sample in two tasks"
    assert set(dict(wanted)) <= set(places), "every wanted sample has a task"
    assert {s for t in plan.new_tasks for s in t.sample_ids} <= set(dict(wanted))

    # After the work is done, the store serves the whole request, and planning again finds nothing.
    after = {group: set(ids) for group, ids in committed.items()}
    for work in plan.work:
        assert work.groups or work.needs_samples
        have = [specs[g] for g, ids in committed.items() if g in specs and work.task.id in ids]
        assert not any(covers(h, want) for h in have for want in work.groups), "no covered group is work"
        for group in work.groups:
            after.setdefault(group_id(group), set()).add(work.task.id)
        after["samples"].add(work.task.id)
    all_specs = {**specs, **{group_id(g): g for g in groups}}
    again = plan_generation(
        known_tasks=tasks,
        committed=after,
        committed_specs=all_specs,
        wanted=wanted,
        groups=groups,
        shard_tokens=12,
    )
    assert again.nothing_to_do and not again.new_tasks and again.rows_to_do == 0
    assert len({w.task.id for w in plan.work}) == len(plan.work)


def test_a_wider_group_of_the_same_request_makes_the_narrower_one_no_work() -> None:
    plan = plan_generation(
        known_tasks={},
        committed={},
        committed_specs={},
        wanted=[("0" * 32, 4)],
        groups=[LogitsSpec(8), LogitsSpec(50), LogitsSpec(50)],
        shard_tokens=100,
    )
    assert plan.work[0].groups == (LogitsSpec(50),) and plan.work[0].needs_samples


@pytest.mark.parametrize(
    ("have", "want", "served"),
    [
        (LogitsSpec(50), LogitsSpec(50), True),
        (LogitsSpec(50), LogitsSpec(16), True),
        (LogitsSpec(16), LogitsSpec(50), False),
        (LogitsSpec(50), LogitsSpec(16, 0.9), True),
        (LogitsSpec(50, 0.9), LogitsSpec(16), False),
        (LogitsSpec(50, 0.9), LogitsSpec(50, 0.8), True),
        (LogitsSpec(50, 0.8), LogitsSpec(50, 0.9), False),
        (HiddenSpec(3, "bf16"), HiddenSpec(3, "bf16"), True),
        (HiddenSpec(3, "bf16"), HiddenSpec(3, "int8"), False),
        (HiddenSpec(3, "bf16"), HiddenSpec(4, "bf16"), False),
        (HiddenSpec(3, "bf16"), LogitsSpec(1), False),
    ],
)
def test_covers(have: GroupSpec, want: GroupSpec, served: bool) -> None:
    assert covers(have, want) is served


def test_invalid_tasks_are_refused() -> None:
    for ids, lengths in [
        ((), ()),
        (("0" * 32,), (0,)),
        (("x" * 32,), (1,)),
        (("0" * 32,) * 2, (1, 1)),
        (("0" * 32,), (1, 2)),
    ]:
        with pytest.raises(ValueError):
            Task(ids, lengths)
    with pytest.raises(ValueError, match="shard_tokens"):
        split_tasks([], 0)
