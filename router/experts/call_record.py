"""One call to one expert worker as the layer that waited for it saw it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class CallRecord:
    """begin, end: time.monotonic(). queue, compute: seconds, in the worker's words; batch_rows: see ExpertReply.

    failure: why there was no answer, such as "lost"; empty: there was one.
    span_id: what the worker knows the call by in the traces that it is written to; 0: in none.
    """

    worker: int
    address: str
    num_rows: int
    begin: float
    end: float
    queue: float = 0.0
    compute: float = 0.0
    batch_rows: int = 0
    failure: str = ""
    span_id: int = 0


LayerHook = Callable[[int, Sequence[CallRecord]], None]
"""(layer, its calls in the order of their ends): called when the last answer of a layer is there."""


def straggler(calls: Sequence[CallRecord]) -> tuple[CallRecord, float] | None:
    """The call that a layer waited for last, and the seconds that it waited for nothing else. None: no call had another
    beside it."""
    answered = [call for call in calls if not call.failure]
    if len(answered) < 2:
        return None
    return answered[-1], answered[-1].end - answered[-2].end
