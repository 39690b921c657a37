"""Prompts into vLLM and outputs back, without a pause: some are always queued behind the step in progress."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# The step in progress, two behind it, and one whose outputs are being taken.
STEPS_IN_FLIGHT = 4


@dataclass(frozen=True, eq=False)
class Ticket:
    """A prompt, int32 [T], and vLLM's output for it, some time after it was put in."""

    tokens: np.ndarray
    output: Future[Any] = field(default_factory=Future)


class Feed:
    """Hands prompts to a vLLM engine as fast as it takes them, in order, and collects what comes out.

    A prompt is in flight from when vLLM has it until its output is taken. So many are in flight as have
    `window` positions together, or one alone: vLLM's queue and the outputs that nobody has taken stay small.

    Args:
        engine: vLLM's LLMEngine.
        params: of every request.
        window: positions in flight at most.
        wait: returns when an output is there, or raises; a thread of the feed's own then steps the engine.
            Without it the engine steps while an output is taken.
    """

    def __init__(
        self, engine: Any, params: Any, window: int, wait: Callable[[Future[Any]], object] | None = None
    ) -> None:
        self._engine, self._params, self._window, self._wait = engine, params, window, wait
        self._waiting: deque[Ticket] = deque()
        self._running: dict[str, Ticket] = {}
        self._numbers, self._in_flight = itertools.count(), 0
        self._closed = False
        self._failure: BaseException | None = None
        self._changed = threading.Condition()
        if wait is not None:
            # A daemon: a step may never return.
            threading.Thread(target=self._run, daemon=True, name="vllm-feed").start()

    def put(self, prompts: Sequence[np.ndarray]) -> list[Ticket]:
        """Have these prompts run after those that were put in before."""
        tickets = [Ticket(tokens) for tokens in prompts]
        with self._changed:
            self._waiting.extend(tickets)
            if self._failure is not None:
                self._fail(self._failure)
            self._changed.notify()
        return tickets

    def take(self, ticket: Ticket) -> Any:
        """The output of a prompt, once it is there; prompts are taken in the order of `put`."""
        if self._wait is not None:
            self._wait(ticket.output)
        while not ticket.output.done():
            self._step()
        with self._changed:
            self._in_flight -= len(ticket.tokens)
            self._changed.notify()
        return ticket.output.result()

    def close(self) -> None:
        """The thread ends after its step; nothing is put in or taken any more."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._running or self._has_room())
                if self._closed:
                    return
            try:
                self._step()
            except BaseException as error:
                with self._changed:
                    self._fail(error)
                return

    def _step(self) -> None:
        for request, ticket in self._admitted().items():
            prompt = {"type": "token", "prompt_token_ids": ticket.tokens.tolist()}
            self._engine.add_request(request, prompt, self._params)
        for output in self._engine.step():
            self._running.pop(output.request_id).output.set_result(output)

    def _admitted(self) -> dict[str, Ticket]:
        """Those that there is room for by now, under new request ids."""
        admitted: dict[str, Ticket] = {}
        with self._changed:
            while self._has_room():
                ticket = self._waiting.popleft()
                self._in_flight += len(ticket.tokens)
                admitted[str(next(self._numbers))] = ticket
        self._running |= admitted
        return admitted

    def _has_room(self) -> bool:
        """Whether a prompt waits, and may be in flight beside those that are."""
        if not self._waiting:
            return False
        return self._in_flight == 0 or self._in_flight + len(self._waiting[0].tokens) <= self._window

    def _fail(self, error: BaseException) -> None:
        """Nobody goes on waiting for an output that will not come."""
        self._failure = error
        for ticket in (*self._running.values(), *self._waiting):
            ticket.output.set_exception(error)
        self._running.clear()
        self._waiting.clear()
