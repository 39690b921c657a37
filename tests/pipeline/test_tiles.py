"""Tiles side by side give what they give one after the other, whatever the number of threads."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator

import pytest
import torch

from pipeline.capture.packing import TILE_ELEMENTS, distribution_fields
from pipeline.capture.spec import CaptureSpec
from pipeline.capture.tiles import run_tiles


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_come_in_order(threads: int) -> None:
    assert run_tiles(lambda start: start * start, range(50)) == [start * start for start in range(50)]
    assert torch.get_num_threads() == threads


def test_an_error_in_a_tile_is_raised(threads: int) -> None:
    with pytest.raises(ZeroDivisionError):
        run_tiles(lambda start: 1 // start, range(3))


def test_each_tile_has_one_thread_and_the_mode_of_its_caller(threads: int) -> None:
    def state(_: int) -> tuple[int, bool, bool]:
        return torch.get_num_threads(), torch.is_inference_mode_enabled(), torch.ones(1).is_inference()

    with torch.inference_mode():
        assert set(run_tiles(state, range(8))) == {(1, True, True)}
    assert set(run_tiles(state, range(8))) == {(1, False, False)}


def test_threads_are_not_tied_to_the_core_of_their_parent() -> None:
    """A worker of vLLM ties its main thread to one core once the threads of OpenMP have theirs."""
    cores = os.sched_getaffinity(0)
    if len(cores) < 2:
        pytest.skip("this machine has one core only")
    context = multiprocessing.get_context("spawn")
    queue: multiprocessing.Queue[set[int]] = context.Queue()
    process = context.Process(target=_tied, args=(queue,))
    process.start()
    assert queue.get(timeout=120) == cores
    process.join()


def _tied(queue: multiprocessing.Queue[set[int]]) -> None:
    torch.set_num_threads(2)
    end = threading.Event()
    other = threading.Thread(target=end.wait)
    other.start()  # stands for a thread of OpenMP that has another core
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    affinities = run_tiles(lambda _: os.sched_getaffinity(0), range(4))
    queue.put(set.intersection(*affinities))
    end.set()


@pytest.mark.parametrize("vocab", [199, 49_152])
def test_features_do_not_depend_on_the_threads(vocab: int, threads: int) -> None:
    spec = CaptureSpec(
        vocab_size=vocab,
        top_k=12,
        top_p=0.7,
        tail=16,
        seed=0,
        temperatures=(2.0, 4.0),
        layers=(),
        hidden_dtypes=(),
    )
    rows = 3 * (TILE_ELEMENTS // vocab) // 2 if vocab > 1000 else 301
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, vocab, generator=generator) * 3
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    shifts = torch.rand(rows, dtype=torch.float64, generator=generator)
    fields = distribution_fields(spec, logits, labels, shifts)
    for row in (0, rows // 2, rows - 1):
        one = distribution_fields(spec, logits[row : row + 1], labels[row : row + 1], shifts[row : row + 1])
        for name, values in one.items():
            torch.testing.assert_close(fields[name][row : row + 1], values, rtol=1e-6, atol=1e-6)
