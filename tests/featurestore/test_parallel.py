"""Work in threads: results in the order of the items, little ahead, and errors at their place."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from featurestore import parallel
from featurestore.parallel import in_order


def test_results_come_in_the_order_of_the_items() -> None:
    second = threading.Event()

    def work(item: int) -> int:
        if item == 0:
            assert second.wait(60)  # the first is ready only when the second is
        if item == 1:
            second.set()
        return item * item

    assert list(in_order(work, range(100))) == [n * n for n in range(100)]


def test_no_more_is_taken_than_is_worked_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    taken: list[int] = []

    def items() -> Iterator[int]:
        while len(taken) < 1000:
            taken.append(len(taken))
            yield taken[-1]

    for number, result in enumerate(in_order(lambda item: item, items())):
        assert result == number and len(taken) <= number + 2 * parallel._FEWEST + 1


def test_an_error_comes_at_its_place_and_starts_no_others() -> None:
    started: list[int] = []

    def work(item: int) -> int:
        started.append(item)
        if item == 3:
            raise ValueError("three")
        return item

    found = []
    with pytest.raises(ValueError, match="three"):
        for result in in_order(work, range(10_000)):
            found.append(result)
    assert found == [0, 1, 2] and len(started) < 1000
