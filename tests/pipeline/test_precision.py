"""What a teacher computes in, and how large steps and shards are, by what the machine does fast."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import RequestError
from pipeline.generate import sizing
from pipeline.generate.pace import SHARD_TOKENS, STEP_TOKENS, Pace, rough_pace
from pipeline.generate.precision import choose_precision
from pipeline.request.generate import GenerateRequest
from tests.command import call, generate
from tests.teachers import llama, text_of

AVX2 = {"float32": 36e9, "bfloat16": 5e9, "float16": 9e9}
AMX = {"float32": 400e9, "bfloat16": 1600e9, "float16": 300e9}
WORDS = {"teacher": "t", "dataset": "d", "out": "o"}
SMALL, LARGE = 135_000_000, 7_000_000_000


def choose(rates: Mapping[str, float], asked: str = "auto", saved: str = "bfloat16", **more: Any) -> Any:
    given = {"stored": None, "quantised": False, "parameters": SMALL, "free_memory": 2**34, **more}
    return choose_precision(asked, saved, rates=lambda: rates, **given)


def test_bfloat16_gives_way_to_float32_where_it_is_slow() -> None:
    chosen = choose(AVX2)
    assert chosen.dtype == "float32"
    assert "7.2 times slower" in chosen.reason and "--dtype bfloat16" in chosen.reason


def test_the_saved_type_stays_where_it_is_fast() -> None:
    assert choose(AMX).dtype == "bfloat16" and choose(AMX).reason == ""
    assert choose(AMX, saved="float16").dtype == "float32"  # slower than float32 by more than a quarter


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_type_that_is_asked_for_is_taken(dtype: str) -> None:
    assert choose(AVX2, asked=dtype, stored="float32").dtype == dtype


def test_a_store_that_holds_rows_decides() -> None:
    """The same command extends a store on another kind of machine, whose own choice would be refused."""
    assert choose(AVX2, stored="bfloat16").dtype == "bfloat16"
    chosen = choose(AMX, stored="float32")
    assert chosen.dtype == "float32" and chosen.reason == "as in the store"


def test_weights_that_would_not_fit_in_float32_stay_as_saved() -> None:
    chosen = choose(AVX2, parameters=LARGE)
    assert chosen.dtype == "bfloat16" and "too little memory" in chosen.reason


def test_quantised_teachers_keep_the_type_that_their_kernels_expect() -> None:
    assert choose(AVX2, quantised=True).dtype == "bfloat16"


@given(rate=st.floats(1e8, 1e15), parameters=st.integers(10**6, 10**12))
def test_sizes_stay_within_their_bounds(rate: float, parameters: int) -> None:
    request = sizing.sized(GenerateRequest(**WORDS), rough_pace(rate, parameters))
    assert STEP_TOKENS.start <= (request.max_num_batched_tokens or 0) <= STEP_TOKENS.stop
    assert SHARD_TOKENS.start <= request.shard_size <= SHARD_TOKENS.stop


def test_a_large_teacher_on_a_slow_cpu_computes_steps_of_seconds() -> None:
    """7B in float32 products of 36 GFLOP/s: 4,096 positions, the former step, would take 50 minutes."""
    pace = rough_pace(AVX2["float32"], LARGE)
    request = sizing.sized(GenerateRequest(**WORDS), pace)
    assert request.max_num_batched_tokens == STEP_TOKENS.start and pace.seconds(STEP_TOKENS.start) < 15
    assert pace.seconds(4096) > 3000


def test_sizes_that_are_given_stay() -> None:
    request = GenerateRequest(**WORDS, max_num_batched_tokens=77, shard_tokens=99)
    assert sizing.sized(request, Pace(1.0, "")) == request


def test_the_machine_decides_and_says_so(
    tmp_path: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teacher that is saved in bfloat16, on a machine that is slow at it, then on one that is not."""
    teacher = in_bfloat16(tiny_teacher, tmp_path / "teacher")
    data = tmp_path / "text.txt"
    data.write_text(text_of(300))
    monkeypatch.setattr(sizing, "matrix_product_rates", lambda: AVX2)
    store = tmp_path / "store"
    done = call("distily-cache", "generate", teacher, data, "--out", store, *FLAGS)
    assert "in float32 (this machine multiplies bfloat16 7.2 times slower" in done.stderr
    assert dtype_of(store) == "float32"
    monkeypatch.setattr(sizing, "matrix_product_rates", lambda: AMX)
    call("distily-cache", "generate", teacher, data, "--out", store, "--temperatures", "2", *FLAGS)
    assert dtype_of(store) == "float32"
    generate(teacher, data, tmp_path / "fast")
    assert dtype_of(tmp_path / "fast") == "bfloat16"


def test_another_type_than_the_store_holds_is_refused(tmp_path: Path, tiny_teacher: Path) -> None:
    data = tmp_path / "text.txt"
    data.write_text(text_of(100))
    generate(tiny_teacher, data, tmp_path / "store")
    words = ("generate", tiny_teacher, data, "--out", tmp_path / "store", "--dtype", "bfloat16", *FLAGS)
    assert "dtype" in call("distily-cache", *words, code=2).stderr


def test_the_first_shard_is_small_where_the_machine_is_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a kill in the first minutes loses little; and it is captured first."""
    teacher = llama(tmp_path / "teacher")
    data = tmp_path / "text.txt"
    data.write_text(text_of(4000))
    monkeypatch.setattr(sizing, "rough_pace", lambda *_: Pace(30.0, ""))
    done = call("distily-cache", "generate", teacher, data, "--out", tmp_path / "store", *FLAGS)
    committed = [line for line in done.stderr.splitlines() if line.startswith("committed")]
    assert [int(line.split()[1].replace(",", "")) for line in committed] == [576, 3424]


FLAGS = ("--engine", "transformers", "--max-seq-len", 64)


def dtype_of(store: Path) -> str:
    return str(json.loads((store / "SPEC.json").read_text())["teacher"]["dtype"])


def in_bfloat16(source: Path, target: Path) -> Path:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
    return target


def test_sizes_below_the_least_are_refused() -> None:
    with pytest.raises(RequestError, match="--max-num-batched-tokens 8: must be at least 16"):
        GenerateRequest(**WORDS, max_num_batched_tokens=8)
