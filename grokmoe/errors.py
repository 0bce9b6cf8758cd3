"""Every error this project raises on purpose, and its place among the gRPC codes.

    GrokmoeError
    ├── InvalidRequest        INVALID_ARGUMENT     the caller's input: names field, value and limit
    ├── NotFound              NOT_FOUND
    ├── AlreadyExists         ALREADY_EXISTS       a request of this id is alive
    ├── Retryable             (one of these two)   carries retry_after
    │   ├── ResourceExhausted RESOURCE_EXHAUSTED   full
    │   └── Unavailable       UNAVAILABLE          a worker is missing
    ├── Unauthenticated       UNAUTHENTICATED      no token, or none that is known
    ├── PermissionDenied      PERMISSION_DENIED    a token that does not reach so far
    ├── FailedPrecondition    FAILED_PRECONDITION  another incarnation, another model
    ├── DeadlineExceeded      DEADLINE_EXCEEDED
    ├── Cancelled             CANCELLED
    ├── InternalError         INTERNAL             our bug
    └── StartupError          (never on the wire)  a process cannot start
        ├── ConfigError       a model configuration or a setting that cannot be
        └── CheckpointError   a checkpoint that cannot be loaded

Each also has a `reason`, finer than its code and as stable (google.rpc.ErrorInfo); docs/errors.md lists them.

An `assert` marks what only a programmer can cause; everything a caller or an operator can cause is in this tree.
How errors travel is in grokmoe/status.py.
"""

from __future__ import annotations

import enum
from typing import Any, ClassVar


class Code(enum.IntEnum):
    """The numbers of google.rpc.Code that are used here; written out so that pure policy needs no gRPC."""

    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    INTERNAL = 13
    UNAVAILABLE = 14
    UNAUTHENTICATED = 16


class Reason(enum.StrEnum):
    """Why a call failed, finer than the code: `reason` of google.rpc.ErrorInfo. A reason is never renamed."""

    INVALID_FIELD = "INVALID_FIELD"
    """A field's value is out of its range; BadRequest names the field."""
    CONFLICTING_FIELDS = "CONFLICTING_FIELDS"
    """Two fields that cannot be used together; BadRequest names one, its description the other."""
    PROMPT_TOO_LONG = "PROMPT_TOO_LONG"
    """The prompt does not fit into the context, or into the KV pages of any attention worker."""
    INVALID_GRAMMAR = "INVALID_GRAMMAR"
    """A structured output's schema, expression or grammar cannot be compiled."""
    CONTROL_SYMBOL = "CONTROL_SYMBOL"
    """The text spells a control symbol, which the request or the server refuses."""
    MALFORMED_MESSAGE = "MALFORMED_MESSAGE"
    """Bytes that are no message, or a tensor that contradicts itself."""
    NO_TOKENIZER = "NO_TOKENIZER"
    """The model has no tokenizer: send token ids, and do not ask for what needs text."""
    DUPLICATE_REQUEST_ID = "DUPLICATE_REQUEST_ID"
    """A request of this id is alive."""
    NOT_FOUND = "NOT_FOUND"
    """What the caller named does not exist."""
    QUEUE_FULL = "QUEUE_FULL"
    """Too many requests wait already."""
    CALLER_LIMIT = "CALLER_LIMIT"
    """This caller has too many requests waiting or running."""
    QUEUE_TIMEOUT = "QUEUE_TIMEOUT"
    """The request waited too long for its first step."""
    WORKER_UNAVAILABLE = "WORKER_UNAVAILABLE"
    """No attention worker, or no holder of an expert, can be reached."""
    SHUTTING_DOWN = "SHUTTING_DOWN"
    """The service is about to end."""
    UNAVAILABLE = "UNAVAILABLE"
    """The service cannot be reached."""
    UNAUTHENTICATED = "UNAUTHENTICATED"
    """The call has no bearer token, or one that the service does not know."""
    PERMISSION_DENIED = "PERMISSION_DENIED"
    """The token is known, but not for calls of this kind."""
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    """A limit of the transport, such as the size of a message."""
    WRONG_INCARNATION = "WRONG_INCARNATION"
    """Between roles: a plan for pages that are not there any more."""
    EXPERT_NOT_HELD = "EXPERT_NOT_HELD"
    """Between roles: rows for an expert that the worker has given up."""
    ADAPTER_NOT_LOADED = "ADAPTER_NOT_LOADED"
    """Between roles: a plan with an adapter that the worker does not have."""
    ADAPTER_REFUSED = "ADAPTER_REFUSED"
    """An adapter's files cannot be used; the message says what is wrong with them."""
    LAST_HOLDER = "LAST_HOLDER"
    """Nobody else holds an expert that a worker is to give up."""
    NO_ROOM = "NO_ROOM"
    """The worker has no memory for more experts, or adapters."""
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    """The two sides do not speak of the same thing."""
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    """The caller's deadline passed."""
    CANCELLED = "CANCELLED"
    """The caller gave up."""
    INTERNAL = "INTERNAL"
    """A bug of ours."""
    UNKNOWN = "UNKNOWN"
    """Not said."""


class GrokmoeError(Exception):
    """Root of the tree. `message` is what a caller reads.

    reason: unset, the one that goes with the type.
    """

    code: ClassVar[Code] = Code.UNKNOWN
    default_reason: ClassVar[Reason] = Reason.UNKNOWN

    def __init__(self, message: str, *, reason: Reason | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.reason = self.default_reason if reason is None else reason


class InvalidRequest(GrokmoeError):
    """The caller's input is at fault. `field` is the path of the request field, such as `sampling.top_p`."""

    code = Code.INVALID_ARGUMENT
    default_reason = Reason.INVALID_FIELD

    def __init__(self, field: str, message: str, *, reason: Reason | None = None) -> None:
        super().__init__(f"{field}: {message}" if field else message, reason=reason)
        self.field = field
        self.description = message

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.field, self.description), {"reason": self.reason}


class NotFound(GrokmoeError):
    """What the caller named does not exist."""

    code = Code.NOT_FOUND
    default_reason = Reason.NOT_FOUND


class AlreadyExists(GrokmoeError):
    """What the caller wants to make is there already."""

    code = Code.ALREADY_EXISTS
    default_reason = Reason.DUPLICATE_REQUEST_ID


class Retryable(GrokmoeError):
    """`retry_after`: seconds after which a new try is reasonable."""

    def __init__(self, message: str, retry_after: float = 1.0, *, reason: Reason | None = None) -> None:
        super().__init__(message, reason=reason)
        self.retry_after = retry_after


class ResourceExhausted(Retryable):
    """No room now."""

    code = Code.RESOURCE_EXHAUSTED
    default_reason = Reason.RESOURCE_EXHAUSTED


class Unavailable(Retryable):
    """A worker or the service cannot be reached now."""

    code = Code.UNAVAILABLE
    default_reason = Reason.UNAVAILABLE


class Unauthenticated(GrokmoeError):
    """Nobody knows who calls: no token, or none that is known."""

    code = Code.UNAUTHENTICATED
    default_reason = Reason.UNAUTHENTICATED


class PermissionDenied(GrokmoeError):
    """The caller is known, and may not do this."""

    code = Code.PERMISSION_DENIED
    default_reason = Reason.PERMISSION_DENIED


class FailedPrecondition(GrokmoeError):
    """The two sides do not speak of the same thing: another incarnation, another model."""

    code = Code.FAILED_PRECONDITION
    default_reason = Reason.FAILED_PRECONDITION


class DeadlineExceeded(GrokmoeError):
    """The caller's deadline passed."""

    code = Code.DEADLINE_EXCEEDED
    default_reason = Reason.DEADLINE_EXCEEDED


class Cancelled(GrokmoeError):
    """The caller gave up."""

    code = Code.CANCELLED
    default_reason = Reason.CANCELLED


class InternalError(GrokmoeError):
    """A bug of ours."""

    code = Code.INTERNAL
    default_reason = Reason.INTERNAL


class StartupError(GrokmoeError):
    """A process cannot start."""


class ConfigError(StartupError):
    """A configuration that cannot be."""


class CheckpointError(StartupError):
    """A checkpoint that cannot be loaded: names tensor, file, expected and found."""
