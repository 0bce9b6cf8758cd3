"""The router's view of the cluster, as the client returns it."""

from __future__ import annotations

import dataclasses
import enum

from grokmoe.read_fields import read_fields
from grokmoe.v1 import control_pb2 as control


class WorkerRole(enum.StrEnum):
    """What a worker does."""

    ATTENTION = "attention"
    EXPERT = "expert"
    UNKNOWN = "unknown"
    """A role that this version of the client does not know."""


class WorkerState(enum.StrEnum):
    """Whether the router uses a worker."""

    JOINING = "joining"
    """Not connected yet, or not described."""
    READY = "ready"
    """In use."""
    SUSPECT = "suspect"
    """A call failed; no new work until it answers again."""
    DRAINING = "draining"
    """About to end: finishes what it has."""
    DEAD = "dead"
    """Away for so long that it is only looked for now and then."""
    UNKNOWN = "unknown"
    """A state that this version of the client does not know."""


@dataclasses.dataclass(frozen=True, slots=True)
class Worker:
    """One worker as the router sees it. Experts are an expert worker's, KV pages an attention worker's."""

    role: WorkerRole
    index: int
    address: str
    state: WorkerState
    incarnation: str
    device: str
    experts: tuple[int, ...]
    num_pages: int
    used_pages: int
    cached_pages: int


@dataclasses.dataclass(frozen=True, slots=True)
class ExpertPlacement:
    """Indices of the expert workers that hold an expert, preferred first, and the rows sent to it so far."""

    expert: int
    workers: tuple[int, ...]
    rows: int


@dataclasses.dataclass(frozen=True, slots=True)
class LegLatency:
    """Seconds spent since start in one leg of a step, and how often it was measured."""

    leg: str
    total_seconds: float
    count: int


@dataclasses.dataclass(frozen=True, slots=True)
class Status:
    """The router's view of the cluster. `waiting` and `running` are sequences now; the counts are since start."""

    workers: tuple[Worker, ...]
    placement: tuple[ExpertPlacement, ...]
    waiting: int
    running: int
    steps: int
    preemptions: int
    legs: tuple[LegLatency, ...]


_ROLES: dict[int, WorkerRole] = {
    control.WORKER_ROLE_ATTENTION: WorkerRole.ATTENTION,
    control.WORKER_ROLE_EXPERT: WorkerRole.EXPERT,
}
_STATES: dict[int, WorkerState] = {
    control.WORKER_STATE_JOINING: WorkerState.JOINING,
    control.WORKER_STATE_READY: WorkerState.READY,
    control.WORKER_STATE_SUSPECT: WorkerState.SUSPECT,
    control.WORKER_STATE_DRAINING: WorkerState.DRAINING,
    control.WORKER_STATE_DEAD: WorkerState.DEAD,
}


def read_status(message: control.GetStatusResponse) -> Status:
    """The router's view of the cluster."""
    workers = (
        read_fields(
            Worker,
            worker,
            role=_ROLES.get(worker.role, WorkerRole.UNKNOWN),
            state=_STATES.get(worker.state, WorkerState.UNKNOWN),
            experts=tuple(worker.experts),
        )
        for worker in message.workers
    )
    placement = (read_fields(ExpertPlacement, entry, workers=tuple(entry.workers)) for entry in message.placement)
    return read_fields(
        Status,
        message,
        workers=tuple(workers),
        placement=tuple(placement),
        legs=tuple(read_fields(LegLatency, leg) for leg in message.legs),
    )
