"""Specifications of sweeps: every combination once, names that are unique and stay when one grows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from student.config.parser import parse as parse_flags
from student.errors import UserError
from student.sweep.capacity import Machine, PeakMemory, at_once
from student.sweep.runs import SweepRun, corners, expand
from student.sweep.spec import parse, read

VALUES = st.lists(
    st.one_of(st.integers(0, 99), st.sampled_from(["a", "b/c", "ü", 0.5, 0.001])),
    min_size=1,
    max_size=4,
    unique_by=str,
)
GRIDS = st.dictionaries(
    st.sampled_from(["learning-rate", "top-k", "ce_weight", "warmup_steps"]), VALUES, min_size=1, max_size=3
)

quick = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def runs(**spec: Any) -> list[SweepRun]:
    return expand(parse(spec, "spec"))


@quick
@given(GRIDS, st.lists(st.integers(0, 5), min_size=1, max_size=3, unique=True))
def test_every_combination_once(grid: dict[str, list[Any]], seeds: list[int]) -> None:
    made = runs(base={"bf16": True}, grid=grid, seeds=seeds)
    wanted = [[]]
    for name, values in [*grid.items(), ("seed", seeds)]:
        wanted = [[*rest, (name.replace("_", "-"), value)] for rest in wanted for value in values]
    assert [dict(run.flags) for run in made] == [{"bf16": True, **dict(flags)} for flags in wanted]
    assert len({run.name for run in made}) == len({run.key for run in made}) == len(made)
    assert all("/" not in run.name and run.name.isascii() for run in made)


@quick
@given(GRIDS, st.integers(100, 200))
def test_names_stay_when_a_specification_grows(grid: dict[str, list[Any]], more: int) -> None:
    before = {run.name for run in runs(base={"max-steps": 3}, grid=grid)}
    wider = {name: [more, *values] for name, values in grid.items()}
    assert before < {run.name for run in runs(base={"max_steps": 3}, grid=wider)}
    assert not before & {run.name for run in runs(base={"max-steps": 4}, grid=grid)}


@quick
@given(GRIDS)
def test_a_new_axis_keeps_the_keys_of_runs_that_leave_it_out(
    grid: dict[str, list[Any]],
) -> None:
    before = {run.key for run in runs(grid=grid)}
    assert before < {run.key for run in runs(grid={**grid, "hidden-loss": [None, "mse"]})}


def test_bundles_set_several_flags_and_null_takes_one_of_the_base_away() -> None:
    bundles = {"plain": None, "hidden": {"hidden-loss": "cosine", "logits_weight": 0.5, "ce-weight": None}}
    plain, hidden = runs(base={"ce_weight": 0.1}, grid={"objective": bundles})
    assert plain.words() == ["--ce-weight", "0.1"]
    assert hidden.words() == ["--hidden-loss", "cosine", "--logits-weight", "0.5"]
    assert (plain.settings, hidden.settings) == ({"objective": "plain"}, {"objective": "hidden"})
    assert hidden.name == f"objective=hidden-{hidden.key}"


def test_rates_without_a_point_are_numbers() -> None:
    (run,) = runs(grid={"learning-rate": ["1e-3"]})
    assert run.words() == ["--learning-rate", "0.001"]


def test_corners_try_each_choice_and_each_end() -> None:
    space = {"learning-rate": {"low": 1e-4, "high": 1e-2}, "top-k": {"choices": [1, 2, 3]}}
    found = corners(parse({"search": {"trials": 5, "space": space}, "seeds": [0, 1]}, "spec"))
    flags = [(run.flags["learning-rate"], run.flags["top-k"]) for run in found]
    assert flags == [(1e-4, 1), (1e-2, 1), (1e-4, 2), (1e-4, 3)]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([], ["mapping"]),
        ({"base": {}}, ["grid", "search"]),
        ({"grid": {"top-k": [1]}, "seds": [0]}, ["seds", "did you mean seeds?"]),
        ({"grid": {"top-k": 4}}, ["grid: top-k", "list of values"]),
        ({"grid": {"top-k": [4, 4.0]}}, ["top-k has 4 twice"]),
        ({"grid": {"--top-k": [4]}}, ["--top-k", "without dashes"]),
        ({"grid": {"output-dir": ["x"]}}, ["output-dir", "leave it out"]),
        ({"base": {"json": True}, "grid": {"top-k": [4]}}, ["json", "leave it out"]),
        ({"grid": {"seed": [1]}, "seeds": [1]}, ["seed and seed both set seed"]),
        ({"grid": {"top-k": [4], "cut": {"a": {"top_k": 8}}}}, ["top-k and cut both set top-k"]),
        ({"grid": {"cut": {"a": {"top-k": 8}, "b": {"top-k": 8}}}}, ["cut=a", "cut=b", "same flags"]),
        ({"grid": {"top-k": [4]}, "metric": "kl"}, ["metric", "eval_kl"]),
        ({"grid": {"top-k": [4]}, "direction": "up"}, ["direction", "minimize"]),
        ({"search": {"space": {"top-k": {"choices": [1]}}}}, ["trials"]),
        ({"search": {"trials": 2, "space": {"top-k": {"low": 4}}}}, ["top-k", "low and high"]),
        ({"search": {"trials": 2, "space": {"top-k": {"low": 0, "high": 4, "log": True}}}}, ["log needs"]),
        ({"grid": {"top-k": [4]}, "seeds": ["a"]}, ["seeds", "whole numbers"]),
    ],
)
def test_bad_specifications(content: object, words: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        expand(parse(content, "spec"))
    assert all(word in str(refused.value) for word in words), refused.value


@pytest.mark.parametrize(("name", "count"), [("quick", 4), ("seed", 96)])
def test_the_examples_are_specifications(name: str, count: int) -> None:
    spec = read(Path(__file__).parents[2] / "examples" / "sweeps" / f"{name}.yaml")
    made = expand(spec)
    assert len(made) == spec.size == count
    for run in made:
        parse_flags(["STORE", "--output-dir", "out", *run.words()]).options.wanted()


def test_runs_at_once() -> None:
    gib = 2**30
    machine = Machine(cores=8, memory=16 * gib)
    assert at_once(machine, []) == 1
    assert at_once(machine, [PeakMemory(gib)]) == 8
    assert at_once(machine, [PeakMemory(gib), PeakMemory(4 * gib)]) == 3
    assert at_once(machine, [PeakMemory(40 * gib)]) == 1
    gpus = Machine(cores=2, memory=64 * gib, gpus=(24 * gib, 24 * gib))
    assert at_once(gpus, [PeakMemory(gib, 6 * gib)]) == 6
    assert at_once(gpus, [PeakMemory(30 * gib, 6 * gib)]) == 1
