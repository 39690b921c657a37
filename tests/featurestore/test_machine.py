"""Which floating-point type a machine multiplies fastest: measured once, and fair on a busy machine."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from distily.system import machine

TYPES = ("float32", "bfloat16")


class Product:
    """Takes so many milliseconds per type; counts its calls."""

    def __init__(self, **milliseconds: float) -> None:
        self.milliseconds, self.calls = milliseconds, 0

    def __call__(self, dtype: str) -> None:
        self.calls += 1
        time.sleep(self.milliseconds[dtype] / 1000)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(machine.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_slow_type_gives_way_to_float32() -> None:
    seconds = machine.product_seconds(TYPES, Product(float32=1, bfloat16=8), "here")
    assert machine.fast_dtype("bfloat16", seconds) == "float32"


def test_a_type_that_is_fast_enough_stays() -> None:
    seconds = machine.product_seconds(TYPES, Product(float32=4, bfloat16=4), "here")
    assert machine.fast_dtype("bfloat16", seconds) == "bfloat16"
    assert machine.fast_dtype("float32", {"float32": 1.0}) == "float32"


def test_it_is_measured_once_per_machine_and_library(monkeypatch: pytest.MonkeyPatch) -> None:
    product = Product(float32=1, bfloat16=1)
    first = machine.product_seconds(TYPES, product, "torch 1")
    calls = product.calls
    assert machine.product_seconds(TYPES, product, "torch 1") == first and product.calls == calls
    machine.product_seconds(TYPES, product, "torch 2")
    assert product.calls == 2 * calls
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX")
    machine.product_seconds(TYPES, product, "torch 1")
    assert product.calls == 3 * calls


@pytest.mark.parametrize("given", [None, "/somewhere/compiled"])
def test_code_for_other_instruction_sets_is_kept_apart(
    monkeypatch: pytest.MonkeyPatch, given: str | None
) -> None:
    def folder(capability: str) -> Path:
        """As a process has it that was started with this capability."""
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", capability)
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        if given is not None:
            monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", given)
        for _ in range(2):
            machine.separate_compiled_code()
        return Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])

    wide, narrow = folder("avx512"), folder("avx2")
    assert wide != narrow and wide.parent == narrow.parent and wide == folder("avx512")
    assert given is None or wide.parent == Path(given)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"float32": "x"}', '{"float32": -1, "bfloat16": 1}'])
def test_a_damaged_file_is_measured_again(cache: Path, content: str) -> None:
    product = Product(float32=1, bfloat16=1)
    machine.product_seconds(TYPES, product, "here")
    (file,) = cache.iterdir()
    file.write_text(content)
    assert set(machine.product_seconds(TYPES, product, "here")) == set(TYPES)


def test_without_a_place_to_write_it_is_measured_each_time(cache: Path) -> None:
    cache.write_text("a file where the directory should be")
    product = Product(float32=1, bfloat16=1)
    machine.product_seconds(TYPES, product, "here")
    calls = product.calls
    machine.product_seconds(TYPES, product, "here")
    assert product.calls == 2 * calls


def test_one_slow_round_does_not_decide() -> None:
    """Something else takes the processor during a product of float32: the least of several times counts."""
    rounds = iter([50, 50, 1, 1, 1])

    def product(dtype: str) -> None:
        time.sleep((next(rounds) if dtype == "float32" else 5) / 1000)

    assert machine.fast_dtype("bfloat16", machine.product_seconds(TYPES, product, "here")) == "float32"
