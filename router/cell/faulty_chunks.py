"""Whose fault it is that a sequence came out as something that is not finite. Changes nothing but the sequences' books.

The first time it may be the worker's: the sequence is recomputed, elsewhere if it can be. If another worker has no
token for it either, the request ends; and at once if it was the experts that had no finite answer: wherever they were
asked, they agreed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from grokmoe.errors import InternalError
from router.sequence import Sequence
from router.step import Step

MAX_FAULTS = 3
"""Times in a row that a sequence may come out as something that is not finite at one worker, where nobody else is in
use. Two workers need not be asked more than once each."""


@dataclasses.dataclass(frozen=True)
class Blame:
    """is_workers: the worker may be at fault. ending: sequences whose requests end, and why."""

    is_workers: bool
    ending: list[tuple[Sequence, InternalError]]


def blame_for(step: Step, faulty: Collection[int], by_experts: Collection[int], worker: str) -> Blame:
    """Counts one fault more for the sequence of every faulty chunk, and judges.

    faulty: places of chunks in the step; by_experts: those that the experts had no finite answer for. worker: its name.
    """
    is_workers, ending = False, []
    for place in faulty:
        sequence = step.chunks[place].sequence
        sequence.num_faults += 1
        is_agreed = sequence.num_faults > 1 and sequence.faulty_at != worker
        sequence.faulty_at = worker
        if place in by_experts:
            ending.append((sequence, InternalError("no expert worker has a finite answer for this request")))
        elif is_agreed or sequence.num_faults > MAX_FAULTS:
            message = f"what {worker} computed for this request is not finite, nor was it the times before"
            ending.append((sequence, InternalError(message)))
        elif (
            not sequence.request.adapter_id
        ):  # an adapter may do that: it is computed again, but no worker blamed for it
            is_workers = True
    return Blame(is_workers, ending)
