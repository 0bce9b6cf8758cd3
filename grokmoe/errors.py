"""Every error this project raises on purpose, and its place among the gRPC codes.

    GrokmoeError
    ├── InvalidRequest        INVALID_ARGUMENT     the caller's input: names field, value and limit
    ├── NotFound              NOT_FOUND
    ├── Retryable             (one of these two)   carries retry_after
    │   ├── ResourceExhausted RESOURCE_EXHAUSTED   full
    │   └── Unavailable       UNAVAILABLE          a worker is missing
    ├── FailedPrecondition    FAILED_PRECONDITION  another incarnation, another model
    ├── DeadlineExceeded      DEADLINE_EXCEEDED
    ├── Cancelled             CANCELLED
    ├── InternalError         INTERNAL             our bug
    └── StartupError          (never on the wire)  a process cannot start
        ├── ConfigError       a model configuration or a setting that cannot be
        └── CheckpointError   a checkpoint that cannot be loaded

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
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    INTERNAL = 13
    UNAVAILABLE = 14


class GrokmoeError(Exception):
    """Root of the tree. `message` is what a caller reads."""

    code: ClassVar[Code] = Code.UNKNOWN

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InvalidRequest(GrokmoeError):
    """The caller's input is at fault. `field` is the path of the request field, such as `sampling.top_p`."""

    code = Code.INVALID_ARGUMENT

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}" if field else message)
        self.field = field
        self.description = message

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.field, self.description)


class NotFound(GrokmoeError):
    """What the caller named does not exist."""

    code = Code.NOT_FOUND


class Retryable(GrokmoeError):
    """`retry_after`: seconds after which a new try is reasonable."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ResourceExhausted(Retryable):
    """No room now."""

    code = Code.RESOURCE_EXHAUSTED


class Unavailable(Retryable):
    """A worker or the service cannot be reached now."""

    code = Code.UNAVAILABLE


class FailedPrecondition(GrokmoeError):
    """The two sides do not speak of the same thing: another incarnation, another model."""

    code = Code.FAILED_PRECONDITION


class DeadlineExceeded(GrokmoeError):
    """The caller's deadline passed."""

    code = Code.DEADLINE_EXCEEDED


class Cancelled(GrokmoeError):
    """The caller gave up."""

    code = Code.CANCELLED


class InternalError(GrokmoeError):
    """A bug of ours."""

    code = Code.INTERNAL


class StartupError(GrokmoeError):
    """A process cannot start."""


class ConfigError(StartupError):
    """A configuration that cannot be."""


class CheckpointError(StartupError):
    """A checkpoint that cannot be loaded: names tensor, file, expected and found."""
