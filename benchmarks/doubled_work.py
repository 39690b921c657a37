"""How many shards several `generate` commands on one store do twice: a simulation of their rule.

    python benchmarks/doubled_work.py

Each command takes the shards of a portion in a random order of its own, leaves out those that are committed
when it comes to them, and leaves those that another has claimed to the end, where it waits for them as long
as eight shards take (`pipeline.generate.planning`, `claims`). An engine is given two shards ahead, as it is
while short ones are captured. Shards take between 0.8 and 1.2 units of time, and every fifth command takes
twice as long; they begin within one unit. Without claims nothing is left to the end: the rule before.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from statistics import mean

from benchmarks.common import table, write_result

REPEATS = 20
AHEAD = 2
LATER = 256
PATIENCE = 8.0
WAIT = 0.25
Shard = tuple[int, int]


class Command:
    """One of the commands; `take` gives the next shard, or None where there is none just now."""

    def __init__(self, portions: list[int], rng: random.Random, slowness: float) -> None:
        orders = [[(number, place) for place in range(count)] for number, count in enumerate(portions)]
        self.todo = deque(shard for order in orders for shard in rng.sample(order, len(order)))
        self.later: deque[Shard] = deque()
        self.ahead: deque[Shard] = deque()
        self.rng, self.slowness = rng, slowness

    def take(self, now: float, ends: dict[Shard, float], claimed: dict[Shard, float], claims: bool) -> bool:
        """Put one more shard ahead; False where the command has to wait, or has nothing left."""
        while self.todo:
            shard = self.todo.popleft()
            if ends.get(shard, now + 1) <= now:
                continue
            if claims and shard in claimed:
                self.later.append(shard)
                if len(self.later) > LATER:
                    self.later = deque(one for one in self.later if ends.get(one, now + 1) > now)
                if len(self.later) <= LATER:
                    continue
                shard = self.later.popleft()
            claimed[shard] = now
            self.ahead.append(shard)
            return True
        if self.ahead:
            return False  # its own are committed before it waits for others'
        while self.later:
            shard = self.later[0]
            if ends.get(shard, now + 1) > now:
                if now - claimed[shard] < PATIENCE * self.slowness:
                    return False
                self.ahead.append(shard)
                self.later.popleft()
                return True
            self.later.popleft()
        return False


def doubled(workers: int, portions: list[int], claims: bool, seed: int = 0) -> float:
    """The share of all shards that are captured in vain. portions: shards of each, taken in order."""
    rng = random.Random(seed)
    ends: dict[Shard, float] = {}
    claimed: dict[Shard, float] = {}
    commands = [Command(portions, rng, 2.0 if place % 5 == 4 else 1.0) for place in range(workers)]
    clock = [(rng.random(), place) for place in range(workers)]
    heapq.heapify(clock)
    captured = 0
    while clock:
        now, place = heapq.heappop(clock)
        command = commands[place]
        while len(command.ahead) <= AHEAD and command.take(now, ends, claimed, claims):
            pass
        if command.ahead:
            shard, end = command.ahead.popleft(), now + command.slowness * rng.uniform(0.8, 1.2)
            ends[shard] = min(end, ends.get(shard, end))
            captured += 1
            heapq.heappush(clock, (end, place))
        elif command.later:
            heapq.heappush(clock, (now + WAIT, place))
    return captured / sum(portions) - 1


def main() -> None:
    rows = []
    for workers in (2, 4, 8, 16):
        total = 100 * workers
        streamed = [64] * (total // 64) + [total % 64] * bool(total % 64)
        shares = [
            mean(doubled(workers, portions, claims, seed) for seed in range(REPEATS))
            for claims in (False, True)
            for portions in ([total], streamed)
        ]
        rows.append([str(workers), str(total), *(f"{share:.2%}" for share in shares)])
    ways = [f"{how}, {of}" for how in ("no claims", "claims") for of in ("one portion", "portions of 64")]
    head = ["commands", "shards", *ways]
    write_result("doubled_work", "Shards that several commands on one store do twice", table(head, rows))


if __name__ == "__main__":
    main()
