"""Training on a part of the cached distribution: what is derived, and that evaluation stays the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from featurestore.format.kinds.logits import narrowed
from featurestore.format.schema import LogitsSpec
from featurestore.reader import CacheReader
from student.errors import UserError
from student.objective.files import read_objective
from student.objective.terms import Objective, term
from student.training.plan import plan_data, plan_split
from tests.student.caches import random_samples, write_cache

WIDE, DEFAULT = LogitsSpec(50), LogitsSpec(12, 0.7, 16, 5)


@pytest.mark.parametrize(
    ("have", "asked", "wanted"),
    [
        (WIDE, (8, None, None), LogitsSpec(8)),
        (WIDE, (8, 0.5, None), LogitsSpec(8, 0.5)),
        (WIDE, (None, 0.5, None), LogitsSpec(50, 0.5)),
        (WIDE, (51, None, None), None),
        (WIDE, (8, None, 4), None),
        (DEFAULT, (None, None, 8), LogitsSpec(12, 0.7, 8, 5)),
        (DEFAULT, (12, 0.7, None), DEFAULT),
        (DEFAULT, (None, None, 0), LogitsSpec(12, 0.7)),
        (DEFAULT, (8, None, None), LogitsSpec(8, 0.7)),
        (DEFAULT, (8, None, 4), None),  # those draws are from outside another head
        (DEFAULT, (None, 0.9, None), None),
        (DEFAULT, (None, None, 17), None),
        (LogitsSpec(5, partial=True), (3, None, None), LogitsSpec(3, partial=True)),
        (LogitsSpec(5, partial=True), (3, None, 2), None),
    ],
)
def test_what_is_derived(have: LogitsSpec, asked: tuple[Any, ...], wanted: LogitsSpec | None) -> None:
    assert narrowed(have, *asked) == wanted


def test_of_several_groups_the_widest_that_covers_serves(teacher: Path, tmp_path: Path) -> None:
    samples = random_samples(8, 199)
    reader = CacheReader.open(
        write_cache(tmp_path / "store", teacher, samples, [LogitsSpec(16), LogitsSpec(32, 0.5)])
    )
    assert reader.find_logits() == LogitsSpec(32, 0.5)
    assert reader.find_logits(top_k=8) == LogitsSpec(8, 0.5)
    assert reader.find_logits(top_k=8, top_p=1.0) == LogitsSpec(8)


def test_training_reads_the_part_and_evaluation_all(cache: Path) -> None:
    reader = CacheReader.open(cache)
    data = plan_data(Objective.of((term("kl"),)), reader, plan_split(reader, 0.25), LogitsSpec(4))
    assert data.train.groups == (LogitsSpec(4),)
    assert data.held_out is not None and data.held_out.groups == (LogitsSpec(16),)


def test_runs_of_other_k_are_measured_alike(train: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    one = ["--student-model-config", '{"num_hidden_layers": 1}', "--max-steps", 2, "--save-strategy", "no"]
    wide, narrow = train(tmp_path / "wide", *one), train(tmp_path / "narrow", *one, "--top-k", 2)
    assert narrow["first_eval"]["eval_kl"] == wide["first_eval"]["eval_kl"]
    assert narrow["last_eval"]["eval_kl"] != wide["last_eval"]["eval_kl"]


def test_what_the_cache_does_not_cover_is_refused(
    refused: Callable[..., str], cache: Path, tmp_path: Path
) -> None:
    def line(*flags: object) -> str:
        return refused("from-cache", cache, "--output-dir", tmp_path / "out", *flags)

    assert "--top-k 17: cannot be derived" in (said := line("--top-k", 17))
    assert "holds top-k 16;" in said and "`distily-cache generate ... --top-k 17`" in said
    assert "generate ... --top-k 4 --tail 8`" in line("--top-k", 4, "--tail", 8)
    assert "--top-k 0: give 1 or more" in line("--top-k", 0)
    assert "--top-p" in line("--top-p", 1.5)
    assert "--tail -1" in line("--tail", -1)
    assert "--top-k has no effect" in line("--top-k", 4, "--logits-loss", "none", "--ce-weight", 1)


def test_an_objective_can_stand_in_the_flag_itself(
    refused: Callable[..., str], cache: Path, tmp_path: Path
) -> None:
    (wanted,) = read_objective(
        '{"terms": [{"loss": "hidden_mse", "weight": 1e-05, "layer_map": {"3": 1}}]}'
    ).terms
    assert (wanted.weight.start, wanted.layer_map) == (1e-5, ((3, 1),))
    inline = '{"terms": [{"loss": "k"}]}'
    assert "--objective: terms[0]" in refused(
        "from-cache", cache, "--output-dir", tmp_path / "out", "--objective", inline
    )


def test_fewer_samples_leave_the_held_out_ones_alone(cache: Path) -> None:
    reader, objective = CacheReader.open(cache), Objective.of((term("kl"),))
    every, few = (plan_data(objective, reader, plan_split(reader, 0.25, samples)) for samples in (None, 7))
    assert [few.train[i].id for i in range(len(few.train))] == [every.train[i].id for i in range(7)]
    assert few.held_out is not None and every.held_out is not None
    assert [one.id for one in few.held_out] == [one.id for one in every.held_out]
    with pytest.raises(UserError, match="--train-samples 99: the cache has"):
        plan_split(reader, 0.25, 99)
