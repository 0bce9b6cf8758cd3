"""Requests of a simulation, and what became of each."""

from __future__ import annotations

import dataclasses
import itertools

from planner.arrivals import Arrival
from planner.simulation import Served
from router.fair_share import Place
from router.request import Request
from router.sequence import Sequence


@dataclasses.dataclass(eq=False)
class Tracked(Served):
    """longest_gap: seconds between two of its tokens, and when that gap ended. num_moves: attention workers it lost."""

    longest_gap: float = 0.0
    gap_ended: float = 0.0
    num_moves: int = 0
    is_over: bool = False

    def note_token(self, now: float) -> None:
        """A token more."""
        if self.last is None:
            self.first = now
        elif now - self.last > self.longest_gap:
            self.longest_gap, self.gap_ended = now - self.last, now
        self.last = now
        self.tokens += 1


def new_sequence(number: int, arrival: Arrival) -> Sequence:
    """As the router's engine makes it of a request. Its first token is its own, so no prefix is shared."""
    prompt = (number + 2, *itertools.repeat(1, arrival.prompt - 1))
    request = Request(request_id=str(number), prompt_ids=prompt, max_tokens=arrival.output)
    return Sequence(request, Place(0.0, number))
