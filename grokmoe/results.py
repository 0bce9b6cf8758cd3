"""What the client returns: frozen values, and how they are read from the messages of grokmoe.v1."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any, TypeVar

from grokmoe.errors import InternalError
from grokmoe.v1 import control_pb2 as control
from grokmoe.v1 import generation_pb2 as pb

T = TypeVar("T")


class FinishReason(enum.StrEnum):
    """Why generation ended."""

    STOP = "stop"
    """The end-of-sequence id or a stop token id was drawn."""
    LENGTH = "length"
    """`max_tokens` or the context was reached."""
    UNKNOWN = "unknown"
    """A reason that this version of the client does not know."""


class WorkerRole(enum.StrEnum):
    """What a worker does."""

    ATTENTION = "attention"
    EXPERT = "expert"
    UNKNOWN = "unknown"


class WorkerState(enum.StrEnum):
    """Whether the router uses a worker."""

    JOINING = "joining"
    READY = "ready"
    SUSPECT = "suspect"
    UNKNOWN = "unknown"


@dataclasses.dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that a request cost. `cached_tokens` of the prompt's were found in the prefix cache."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclasses.dataclass(frozen=True, slots=True)
class Timing:
    """Seconds from arrival at the server to: first scheduled, first token (TTFT), end."""

    queue_seconds: float
    first_token_seconds: float
    total_seconds: float


@dataclasses.dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer. `token_ids` includes the stop token if there is one; `text` does not."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    timing: Timing


@dataclasses.dataclass(frozen=True, slots=True)
class Delta:
    """What is new in a stream. `usage` counts from its start; only the last has `finish_reason` and `timing`."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    usage: Usage
    timing: Timing | None


@dataclasses.dataclass(frozen=True, slots=True)
class ModelInfo:
    """What is served. `context_length` bounds prompt and output together; text prompts need `has_tokenizer`."""

    name: str
    config_hash: str
    vocab_size: int
    context_length: int
    num_layers: int
    num_experts: int
    experts_per_token: int
    hidden_size: int
    eos_token_ids: tuple[int, ...]
    has_tokenizer: bool
    dtype: str


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


_FINISH_REASONS: dict[int, FinishReason] = {
    pb.FINISH_REASON_STOP: FinishReason.STOP,
    pb.FINISH_REASON_LENGTH: FinishReason.LENGTH,
}
_ROLES: dict[int, WorkerRole] = {
    control.WORKER_ROLE_ATTENTION: WorkerRole.ATTENTION,
    control.WORKER_ROLE_EXPERT: WorkerRole.EXPERT,
}
_STATES: dict[int, WorkerState] = {
    control.WORKER_STATE_JOINING: WorkerState.JOINING,
    control.WORKER_STATE_READY: WorkerState.READY,
    control.WORKER_STATE_SUSPECT: WorkerState.SUSPECT,
}


def _read(kind: type[T], message: Any, **converted: Any) -> T:
    """Builds `kind` from the message's fields of the same names; `converted` has those that differ in type."""
    names = [field.name for field in dataclasses.fields(kind) if field.name not in converted]  # type: ignore[arg-type]
    return kind(**{name: getattr(message, name) for name in names}, **converted)


def _finish_reason(number: int) -> FinishReason | None:
    if number == pb.FINISH_REASON_UNSPECIFIED:
        return None
    return _FINISH_REASONS.get(number, FinishReason.UNKNOWN)


def read_completion(message: pb.GenerateResponse) -> Completion:
    """InternalError if the server did not say why generation ended."""
    finish_reason = _finish_reason(message.finish_reason)
    if finish_reason is None:
        raise InternalError("the server answered without a finish reason")
    return _read(
        Completion,
        message,
        token_ids=tuple(message.token_ids),
        finish_reason=finish_reason,
        usage=_read(Usage, message.usage),
        timing=_read(Timing, message.timing),
    )


def read_delta(message: pb.StreamGenerateResponse) -> Delta:
    """One message of a stream."""
    finish_reason = _finish_reason(message.finish_reason)
    return Delta(
        text=message.text_delta,
        token_ids=tuple(message.token_ids),
        finish_reason=finish_reason,
        usage=_read(Usage, message.usage),
        timing=None if finish_reason is None else _read(Timing, message.timing),
    )


def read_model(message: pb.GetModelResponse) -> ModelInfo:
    """What is served."""
    return _read(ModelInfo, message, eos_token_ids=tuple(message.eos_token_ids))


def read_status(message: control.GetStatusResponse) -> Status:
    """The router's view of the cluster."""
    workers = (
        _read(
            Worker,
            worker,
            role=_ROLES.get(worker.role, WorkerRole.UNKNOWN),
            state=_STATES.get(worker.state, WorkerState.UNKNOWN),
            experts=tuple(worker.experts),
        )
        for worker in message.workers
    )
    placement = (_read(ExpertPlacement, entry, workers=tuple(entry.workers)) for entry in message.placement)
    return _read(
        Status,
        message,
        workers=tuple(workers),
        placement=tuple(placement),
        legs=tuple(_read(LegLatency, leg) for leg in message.legs),
    )
