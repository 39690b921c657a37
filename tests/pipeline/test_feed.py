"""vLLM's queue stays filled, within a bound, and what comes out of it goes to the prompt that it is of."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline.engines.feed import Feed
from pipeline.engines.llm import own_step_tokens

STEP, WINDOW = 100, 400


class FakeEngine:
    """Of vLLM's LLMEngine what the feed uses: whole prompts of STEP positions in a step, the last one first.

    queued: positions that wait when each step begins. A step waits for `allowed` steps.
    """

    def __init__(self, allowed: int = 10**6) -> None:
        self._queue: deque[tuple[str, list[int]]] = deque()
        self.queued: list[int] = []
        self.allowed = threading.Semaphore(allowed)
        self.fails_at = 10**6

    def add_request(self, request: str, prompt: dict[str, Any], params: object) -> None:
        assert prompt["type"] == "token" and params == "params"
        self._queue.append((request, prompt["prompt_token_ids"]))

    def step(self) -> list[Any]:
        self.queued.append(sum(len(tokens) for _, tokens in self._queue))
        self.allowed.acquire()
        if len(self.queued) == self.fails_at:
            raise OSError("the engine is gone")
        batch: list[Any] = []
        while self._queue and sum(len(output.tokens) for output in batch) < STEP:
            request, tokens = self._queue.popleft()
            batch.append(SimpleNamespace(request_id=request, tokens=tokens))
        return batch[::-1]


def prompts(*lengths: int) -> list[np.ndarray]:
    return [np.full(length, number, np.int32) for number, length in enumerate(lengths)]


def wait(answer: Future[Any]) -> object:
    return answer.exception(timeout=60)


@pytest.fixture(params=[wait, None], ids=["in a thread", "while an output is taken"])
def waiting(request: pytest.FixtureRequest) -> Any:
    return request.param


def taken(feed: Feed, given: list[np.ndarray]) -> Iterator[list[int]]:
    for ticket in feed.put(given):
        yield feed.take(ticket).tokens


def test_outputs_go_to_their_prompts_in_order(waiting: Any) -> None:
    """A prompt longer than the window is in flight alone."""
    given = prompts(10, 60, 60, WINDOW + 1, 5, 5, 100, 100, 100, 100, 100, 100)
    engine = FakeEngine()
    feed = Feed(engine, "params", WINDOW, waiting)
    assert list(taken(feed, given)) == [tokens.tolist() for tokens in given]
    assert list(taken(feed, given[:3])) == [tokens.tolist() for tokens in given[:3]]
    assert max(engine.queued) == WINDOW + 1
    feed.close()


def test_several_prompts_are_in_flight_all_the_time(waiting: Any) -> None:
    """While outputs are taken as they come, each step but the last leaves others queued behind it."""
    engine = FakeEngine(allowed=0 if waiting else 10**6)
    feed = Feed(engine, "params", WINDOW, waiting)
    count = 20
    for ticket in feed.put(prompts(*[STEP] * count)):
        engine.allowed.release()
        feed.take(ticket)
    feed.close()
    assert len(engine.queued) == count
    assert max(engine.queued) == WINDOW
    assert min(engine.queued[: count - WINDOW // STEP]) >= 2 * STEP


def test_what_nobody_takes_is_bounded() -> None:
    """The thread goes on by itself until a window of outputs lies there, and no further."""
    engine = FakeEngine()
    feed = Feed(engine, "params", WINDOW, wait)
    tickets = feed.put(prompts(*[STEP] * 10))
    wait(tickets[3].output)
    assert not any(ticket.output.done() for ticket in tickets[4:]) and len(engine.queued) == 4
    feed.take(tickets[0])
    wait(tickets[4].output)
    assert not any(ticket.output.done() for ticket in tickets[5:])
    assert max(engine.queued) == WINDOW
    feed.close()


def test_an_error_reaches_everybody_who_waits(waiting: Any) -> None:
    engine = FakeEngine()
    engine.fails_at = 2
    feed = Feed(engine, "params", WINDOW, waiting)
    tickets = feed.put(prompts(*[STEP] * 10))
    assert feed.take(tickets[0]).tokens
    for ticket in tickets[1:3] if waiting else tickets[1:2]:
        with pytest.raises(OSError, match="the engine is gone"):
            feed.take(ticket)
    if waiting:
        (late,) = feed.put(prompts(1))
        with pytest.raises(OSError, match="the engine is gone"):
            feed.take(late)


@pytest.mark.vllm
def test_steps_on_a_gpu_are_as_large_as_vllms_own(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(
        get_device_total_memory=lambda: 80 * 2**30,
        get_device_name=lambda: "NVIDIA H100 80GB HBM3",
        is_tpu=lambda: False,
        is_cpu=lambda: False,
    )
    monkeypatch.setattr("vllm.engine.arg_utils.current_platform", gpu)
    assert own_step_tokens(1) == 16_384
    gpu.get_device_total_memory = lambda: 24 * 2**30
    assert own_step_tokens(1) == 8192
