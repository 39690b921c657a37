"""What `plan` says a run would cost: bytes from the store, time from earlier runs or the machine."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from distily.units import duration
from featurestore.format.kinds.table import kind_of
from featurestore.format.plan import Task, Work
from featurestore.format.schema import HiddenSpec, LogitsSpec, LseSpec, group_id
from featurestore.maintenance.info import store_info
from featurestore.store import FeatureStore
from pipeline.generate.estimate import bytes_of, stored_row_bytes
from pipeline.generate.pace import Pace, earlier_pace, matrix_product_rates, rough_pace
from pipeline.teacher.checkpoint import count_parameters, load_teacher
from tests.command import call, generate
from tests.featurestore.conftest import fill
from tests.teachers import text_of

run = partial(call, "distily-cache")


def record(tokens: Any, seconds: Any, engine: str = "vllm") -> dict[str, Any]:
    return {"request": {"engine": engine}, "tokens": tokens, "capture_seconds": seconds}


def test_the_pace_is_the_median_of_earlier_runs_with_the_same_engine() -> None:
    runs = [record(1000, 1.0), record(100, 2.0), record(9000, 3.0), record(7, 1.0, "transformers")]
    assert earlier_pace(runs, "vllm") == Pace(1000.0, "from 3 earlier runs of this store")
    assert earlier_pace(runs[:1], "vllm") == Pace(1000.0, "from 1 earlier run of this store")
    assert earlier_pace(runs, "transformers") == Pace(7.0, "from 1 earlier run of this store")
    assert earlier_pace([], "vllm") is None
    useless = [{}, {"request": 3}, {"request": {}}, record(0, 1.0), record(5, 0.0), record("many", 1.0)]
    assert earlier_pace([*useless, record(5, None)], "vllm") is None


@given(st.floats(1e6, 1e15), st.integers(1, 10**12), st.integers(0, 10**12))
def test_a_rough_pace_is_half_of_the_machine_at_two_operations_per_parameter(
    rate: float, parameters: int, tokens: int
) -> None:
    pace = rough_pace(rate, parameters)
    assert pace.seconds(tokens) == pytest.approx(4 * parameters * tokens / rate)
    assert pace.source.startswith("rough: ")


def test_the_machine_is_measured() -> None:
    assert 1e7 < matrix_product_rates()["float32"] < 1e16


def test_bytes_follow_the_store_where_it_knows_the_group(tmp_path: Path) -> None:
    known, other = LogitsSpec(8, 0.9), HiddenSpec(1, "int8")
    filled = fill(tmp_path / "store", [known], count=6)
    records = filled.store.commits()[group_id(known)].values()
    per_row = sum(record.size for record in records) / sum(record.rows for record in records)
    stored = stored_row_bytes(FeatureStore.open(tmp_path / "store"))
    assert stored == {known: pytest.approx(per_row)}
    tasks = [Task((f"{i:032x}",), (length,)) for i, length in enumerate((100, 300))]
    work = [Work(tasks[0], (known, other), True), Work(tasks[1], (other, LseSpec(2)), False)]
    assert bytes_of(work, stored, 16) == pytest.approx(
        100 * per_row + 400 * 20 + 300 * kind_of(LseSpec(2)).row_bytes(LseSpec(2), 16)
    )
    rough = kind_of(known).row_bytes(known, 16)
    assert bytes_of(work, {}, 16) - bytes_of(work, stored, 16) == pytest.approx(100 * (rough - per_row))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (119, "119 s"), (120, "2.0 min"), (7200, "2.0 h"), (1e6, "11.6 days")],
)
def test_durations_are_read_by_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_parameters_are_counted_from_the_headers(tiny_teacher: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher)
    assert count_parameters(load_teacher(str(tiny_teacher))) == model.num_parameters()


def test_plan_names_time_and_where_it_is_from(tiny_teacher: Path, tmp_path: Path) -> None:
    corpus, store = tmp_path / "corpus.jsonl", tmp_path / "store"
    corpus.write_text("\n".join(json.dumps({"text": text_of(60, seed)}) for seed in range(12)))
    options = ("--out", store, "--engine", "transformers", "--max-seq-len", 64)
    arguments = ("plan", tiny_teacher, corpus, *options)
    head = ("--top-k", 16, "--top-p", 0.5)
    rough = json.loads(run(*arguments, *head, "--json").stdout)
    assert rough["seconds"] > 0 and rough["seconds_from"].startswith("rough: ")
    assert rough["bytes_measured"] is False
    assert not store.exists()
    first = generate(tiny_teacher, corpus, store, *head, "--num-samples", 6)
    planned = json.loads(run(*arguments, *head, "--json").stdout)
    assert planned["seconds_from"] == "from 1 earlier run of this store" and planned["bytes_measured"] is True
    rate = first["tokens"] / first["capture_seconds"]
    assert planned["seconds"] == pytest.approx(planned["tokens_to_do"] / rate, rel=0.02, abs=2e-3)
    (group,) = (g for g in store_info(store).groups.values() if g.kind == "logits")
    assert planned["bytes_to_write"] == round(group.bytes_per_row * planned["tokens_to_do"])
    text = " ".join(run(*arguments, *head).stdout.replace("│", " ").split())
    assert "from 1 earlier run" in text and "start of the engine is not counted" in text
    generate(tiny_teacher, corpus, store, *head)
    done = json.loads(run(*arguments, *head, "--json").stdout)
    assert (done["seconds"], done["seconds_from"], done["bytes_to_write"]) == (0.0, "nothing to do", 0)


def test_the_teachers_weights_are_counted_until_they_are_there(tiny_teacher: Path, tmp_path: Path) -> None:
    corpus, store = tmp_path / "corpus.jsonl", tmp_path / "store"
    corpus.write_text(json.dumps({"text": text_of(60, 1)}))
    options = ("--out", store, "--engine", "transformers", "--max-seq-len", 64, "--top-k", 0)
    flags = ("--final", "--relation-layers", 1, "--hidden-dtype", "int8")
    arguments = ("plan", tiny_teacher, corpus, *options, *flags)
    planned = json.loads(run(*arguments, "--json").stdout)
    # V=199, D=64 and the final norm; a norm, 2 query heads of 32, one for keys and one for values.
    weights = 4 * (199 * 64 + 64 + 64 + (64 + 32 + 32) * 64)
    assert planned["sidecar_bytes"] == weights
    assert planned["bytes_to_write"] == weights + planned["tokens"] * 2 * (64 + 4)
    assert planned["groups_to_do"] == ["hidden.L1", "hidden.L3"]
    done = generate(tiny_teacher, corpus, store, "--top-k", 0, *flags)
    # Headers on top: names, shapes, what the weights mean.
    assert weights < done["sidecar_size"] < weights + 4096
    found = json.loads(run("info", store, "--json").stdout)
    assert sum(found["sidecar"].values()) == done["sidecar_size"] and list(found["sidecar"]) == [
        "head",
        "block1",
    ]
    assert "block1" in run("info", store).stdout
    again = json.loads(run(*arguments, "--json").stdout)
    assert (again["sidecar_bytes"], again["bytes_to_write"]) == (0, 0)
    more = ("--final", "--relation-layers", "1,0", "--hidden-dtype", "int8")
    text = run("plan", tiny_teacher, corpus, *options, *more).stdout
    assert "of them the teacher's weights" in text
