"""Whether a worker is used: five states, four events, one table. Pure.

      JOINING --answered--> READY --failed--> SUSPECT --away--> DEAD
                              |                  ^              ^
                            drains             failed          away
                              v                  |              |
                              +------------> DRAINING ----------+

answered leads from every state to READY, drains from every state to DRAINING.

Every state but READY gets no new work, from the moment it is entered: a penalty would still send some. A worker that
is not READY is probed (router/probing.py) for as long as it is a member.
"""

from __future__ import annotations

import enum


class WorkerState(enum.Enum):
    """JOINING: not described yet. READY: in use. SUSPECT: a call failed or took too long. DRAINING: about to end, by
    its own word; finishes what it has. DEAD: away for long; probed at the longest pause.
    """

    JOINING = "joining"
    READY = "ready"
    SUSPECT = "suspect"
    DRAINING = "draining"
    DEAD = "dead"


class WorkerEvent(enum.Enum):
    """ANSWERED: it has described itself and fits. DRAINS: it says that it is about to end. FAILED: a call failed, or
    a probe of a draining worker finds nobody. AWAY: it has not answered for `dead_after` seconds.
    """

    ANSWERED = "answered"
    DRAINS = "drains"
    FAILED = "failed"
    AWAY = "away"


_NEXT: dict[tuple[WorkerState, WorkerEvent], WorkerState] = {
    (WorkerState.READY, WorkerEvent.FAILED): WorkerState.SUSPECT,
    (WorkerState.DRAINING, WorkerEvent.FAILED): WorkerState.SUSPECT,
    (WorkerState.SUSPECT, WorkerEvent.AWAY): WorkerState.DEAD,
    (WorkerState.DRAINING, WorkerEvent.AWAY): WorkerState.DEAD,
}


def after(state: WorkerState, event: WorkerEvent) -> WorkerState:
    """The state that follows. A pair that is not in the drawing changes nothing."""
    if event is WorkerEvent.ANSWERED:
        return WorkerState.READY
    if event is WorkerEvent.DRAINS:
        return WorkerState.DRAINING
    return _NEXT.get((state, event), state)
