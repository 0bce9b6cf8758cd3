"""The router's view of the cluster, as the client returns it."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Sequence
from typing import Any

from grokmoe.read_fields import read_fields
from grokmoe.v1 import control_pb2 as control
from grokmoe.v1 import expert_pb2


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
class ExpertRange:
    """One expert in the layers from `layer_begin` to before `layer_end`; 0: to the last one.

    slice, num_slices: where it is cut along its ffn dimension, which slice is meant, from 0 on, and of how many.
    """

    expert: int
    layer_begin: int = 0
    layer_end: int = 0
    slice: int = 0
    num_slices: int = 1


@dataclasses.dataclass(frozen=True, slots=True)
class ExpertMove:
    """Experts from one expert worker to another, by address.

    source: who gives them up; empty: nobody, the target is one holder more. target: who takes them; empty: nobody, the
    source is one holder less. phase: "loading", "draining", or empty: not begun.
    """

    experts: tuple[ExpertRange, ...]
    source: str
    target: str
    phase: str


@dataclasses.dataclass(frozen=True, slots=True)
class MoveCost:
    """What a move cost: bytes of weights loaded, seconds until the target was ready, and from then until the source
    had answered what it had been given.
    """

    loaded_bytes: int
    load_seconds: float
    drain_seconds: float
    placement_version: int


@dataclasses.dataclass(frozen=True, slots=True)
class Rebalance:
    """What a rebalance did, or would do.

    moves: in their order. imbalance: load of the busiest worker over the mean, as measured; 1 is even, 0: too few rows.
    forecast_imbalance: after the moves. gain_seconds: of expert computation, saved within the router's horizon.
    cost_seconds: of expert computation, for loading. done: whether the moves were made. reason: why not.
    """

    moves: tuple[ExpertMove, ...]
    imbalance: float
    forecast_imbalance: float
    gain_seconds: float
    cost_seconds: float
    done: bool
    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class PipelineStage:
    """An attention worker that holds the layers from `layer_begin` to before `layer_end`."""

    address: str
    layer_begin: int
    layer_end: int
    device: str
    incarnation: str


@dataclasses.dataclass(frozen=True, slots=True)
class Worker:
    """One worker as the router sees it; a pipeline of attention workers counts as one. Experts are an expert worker's,
    KV pages an attention worker's.

    held, loading: experts and their layers. rows_per_second: rows that it was given lately. stages: a pipeline's, in
    the order of their layers; empty: it holds all layers, or has not joined yet.
    """

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
    held: tuple[ExpertRange, ...] = ()
    loading: tuple[ExpertRange, ...] = ()
    rows_per_second: float = 0.0
    stages: tuple[PipelineStage, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class ExpertPlacement:
    """Indices of the expert workers that hold an expert, preferred first, and the rows sent to it so far.

    layer_rows: the same rows layer by layer; empty: an older server does not say. slice, num_slices: see ExpertRange.
    Of a slice the rows are its expert's.
    """

    expert: int
    workers: tuple[int, ...]
    rows: int
    layer_rows: tuple[int, ...] = ()
    slice: int = 0
    num_slices: int = 1


@dataclasses.dataclass(frozen=True, slots=True)
class LegLatency:
    """Seconds spent since start in one leg of a step, and how often it was measured."""

    leg: str
    total_seconds: float
    count: int


@dataclasses.dataclass(frozen=True, slots=True)
class Status:
    """The router's view of the cluster. `waiting` and `running` are sequences now; the counts are since start.

    placement_version: grows whenever the table of who holds what changes. imbalance: rows of the busiest expert worker
    over the mean, lately; 0: too few. moves: those under way.
    """

    workers: tuple[Worker, ...]
    placement: tuple[ExpertPlacement, ...]
    waiting: int
    running: int
    steps: int
    preemptions: int
    legs: tuple[LegLatency, ...]
    placement_version: int = 0
    imbalance: float = 0.0
    moves: tuple[ExpertMove, ...] = ()


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
            held=_read_ranges(worker.held),
            loading=_read_ranges(worker.loading),
            stages=tuple(read_fields(PipelineStage, stage) for stage in worker.stages),
        )
        for worker in message.workers
    )
    placement = (
        read_fields(
            ExpertPlacement,
            entry,
            workers=tuple(entry.workers),
            layer_rows=tuple(entry.layer_rows),
            num_slices=entry.num_slices or 1,
        )
        for entry in message.placement
    )
    return read_fields(
        Status,
        message,
        workers=tuple(workers),
        placement=tuple(placement),
        legs=tuple(read_fields(LegLatency, leg) for leg in message.legs),
        moves=tuple(map(_read_move, message.moves)),
    )


def _read_ranges(ranges: Iterable[Any]) -> tuple[ExpertRange, ...]:
    return tuple(read_fields(ExpertRange, each, num_slices=each.num_slices or 1) for each in ranges)


def _read_move(message: control.ExpertMove) -> ExpertMove:
    # `from` is a word of Python.
    return ExpertMove(_read_ranges(message.experts), getattr(message, "from"), message.to, message.phase)


def read_move_cost(message: control.MoveExpertsResponse) -> MoveCost:
    """What a move cost."""
    return read_fields(MoveCost, message)


def read_rebalance(message: control.RebalanceExpertsResponse) -> Rebalance:
    """What a rebalance did."""
    return read_fields(Rebalance, message, moves=tuple(map(_read_move, message.moves)))


def build_move_request(
    experts: int | ExpertRange | Sequence[int | ExpertRange], source: str | None, target: str | None
) -> control.MoveExpertsRequest:
    """A bare number is a whole expert in all layers."""
    each_of = [experts] if isinstance(experts, int | ExpertRange) else experts
    ranges = [each if isinstance(each, ExpertRange) else ExpertRange(each) for each in each_of]
    return control.MoveExpertsRequest(
        experts=[expert_pb2.ExpertRange(**dataclasses.asdict(each)) for each in ranges],
        to=target or "",
        **{"from": source or ""},
    )
