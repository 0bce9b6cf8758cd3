"""One attention worker on a simulated clock: the router's own scheduler and page ledger, steps that take planned times.

arrives --add--> scheduler --schedule--> step in flight --its planned time--> complete --> tokens
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections.abc import Callable
from collections.abc import Sequence as Listed

from planner.arrivals import Arrival
from planner.shape import StepShape, of_chunks
from router.fair_share import Place
from router.pages import PageLedger
from router.request import Request
from router.scheduler import Scheduler
from router.sequence import Sequence
from router.step import SchedulerSettings, Step

Pace = Callable[[StepShape, int], float]
"""Seconds of a step, given its shape and how many of this worker are in flight, itself included."""


@dataclasses.dataclass
class Served:
    """One request's times, seconds of the simulation. first, last: of its tokens."""

    arrival: Arrival
    first: float | None = None
    last: float | None = None
    tokens: int = 0

    @property
    def ttft(self) -> float | None:
        """Time to first token."""
        return None if self.first is None else self.first - self.arrival.time

    @property
    def tpot(self) -> float | None:
        """Per token after the first; None: there is no second."""
        if self.first is None or self.last is None or self.tokens < 2:
            return None
        return (self.last - self.first) / (self.tokens - 1)


@dataclasses.dataclass
class Simulated:
    """served: in the order of arrival. steps: shapes and times of all steps. end: when the last one ended."""

    served: list[Served]
    steps: list[tuple[StepShape, float]]
    end: float = 0.0
    preemptions: int = 0


def simulate(
    arrivals: Listed[Arrival], settings: SchedulerSettings, num_pages: int, page_size: int, pace: Pace
) -> Simulated:
    """Serves all arrivals, which ascend in time. Raises InvalidRequest for one that never fits."""
    scheduler = Scheduler(settings, PageLedger(num_pages, page_size))
    result = Simulated([Served(each) for each in arrivals], [])
    owner: dict[Sequence, Served] = {}
    flying: list[tuple[float, int, Step]] = []
    numbers = itertools.count()
    waiting, now = iter(enumerate(result.served)), 0.0
    coming = next(waiting, None)
    while True:
        while coming is not None and coming[1].arrival.time <= now:
            sequence = _sequence(coming[0], coming[1].arrival)
            owner[sequence] = coming[1]
            scheduler.add(sequence)
            coming = next(waiting, None)
        while (step := scheduler.schedule()) is not None:
            shape = of_chunks((chunk.start, chunk.end, chunk.wants_token) for chunk in step.chunks)
            seconds = pace(shape, len(flying) + 1)
            result.steps.append((shape, seconds))
            heapq.heappush(flying, (now + seconds, next(numbers), step))
        if flying and (coming is None or flying[0][0] <= coming[1].arrival.time):
            now, _, step = heapq.heappop(flying)
            _deliver(scheduler, step, owner, now)
        elif coming is not None:
            now = coming[1].arrival.time
        else:
            break
    result.end, result.preemptions = now, scheduler.num_preemptions
    return result


def _sequence(number: int, arrival: Arrival) -> Sequence:
    # Its first token is its own, so no prefix is shared.
    prompt = (number + 2, *itertools.repeat(1, arrival.prompt - 1))
    request = Request(request_id=str(number), prompt_ids=prompt, max_tokens=arrival.output)
    return Sequence(request, Place(0.0, number))


def _deliver(scheduler: Scheduler, step: Step, owner: dict[Sequence, Served], now: float) -> None:
    tokens = [1] * sum(chunk.wants_token for chunk in step.chunks)
    for drawn in scheduler.complete(step, tokens):
        served = owner[drawn.sequence]
        if drawn.token_id is not None:
            served.first = now if served.first is None else served.first
            served.last = now
            served.tokens += 1
        if drawn.finish_reason is not None:
            del owner[drawn.sequence]
