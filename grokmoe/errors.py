"""Every error this project raises on purpose, and its place among the gRPC codes.

    GrokmoeError
    ├── InvalidRequest        INVALID_ARGUMENT     the caller's input: names field, value and limit
    ├── NotFound              NOT_FOUND
    ├── ResourceExhausted     RESOURCE_EXHAUSTED   full; carries retry_after
    ├── FailedPrecondition    FAILED_PRECONDITION  another incarnation, another model
    ├── Unavailable           UNAVAILABLE          a worker is missing; carries retry_after
    ├── DeadlineExceeded      DEADLINE_EXCEEDED
    ├── Cancelled             CANCELLED
    ├── InternalError         INTERNAL             our bug
    └── StartupError          (never on the wire)  a process cannot start
        ├── ConfigError       a model configuration or a setting that cannot be
        └── CheckpointError   a checkpoint that cannot be loaded

An `assert` marks what only a programmer can cause; everything a caller or an operator can cause is in this tree.
"""

from __future__ import annotations

import datetime
from typing import Any, ClassVar

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from grokmoe.v1 import failure_pb2

ERROR_DOMAIN = "grokmoe"

MAX_STATUS_MESSAGE_BYTES = 1024
"""A longer message is cut. It travels three times in the call's trailers, once percent-encoded, and trailers above
8 KiB turn the call's status into RESOURCE_EXHAUSTED."""


class GrokmoeError(Exception):
    """Root of the tree. `message` is what a caller reads."""

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InvalidRequest(GrokmoeError):
    """The caller's input is at fault. `field` is the path of the request field, such as `sampling.top_p`."""

    code = grpc.StatusCode.INVALID_ARGUMENT

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}" if field else message)
        self.field = field
        self.description = message

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.field, self.description)


class NotFound(GrokmoeError):
    """What the caller named does not exist."""

    code = grpc.StatusCode.NOT_FOUND


class _Retryable(GrokmoeError):
    """`retry_after`: seconds after which a new try is reasonable."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ResourceExhausted(_Retryable):
    """No room now."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class Unavailable(_Retryable):
    """A worker or the service cannot be reached now."""

    code = grpc.StatusCode.UNAVAILABLE


class FailedPrecondition(GrokmoeError):
    """The two sides do not speak of the same thing: another incarnation, another model."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class DeadlineExceeded(GrokmoeError):
    """The caller's deadline passed."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class Cancelled(GrokmoeError):
    """The caller gave up."""

    code = grpc.StatusCode.CANCELLED


class InternalError(GrokmoeError):
    """A bug of ours."""

    code = grpc.StatusCode.INTERNAL


class StartupError(GrokmoeError):
    """A process cannot start."""


class ConfigError(StartupError):
    """A configuration that cannot be."""


class CheckpointError(StartupError):
    """A checkpoint that cannot be loaded: names tensor, file, expected and found."""


_BY_CODE: dict[grpc.StatusCode, type[GrokmoeError]] = {
    cls.code: cls
    for cls in (
        NotFound,
        ResourceExhausted,
        Unavailable,
        FailedPrecondition,
        DeadlineExceeded,
        Cancelled,
        InternalError,
    )
}
_CODE_BY_NUMBER: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


def _build(code: grpc.StatusCode, message: str, field: str = "", retry_after: float | None = None) -> GrokmoeError:
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        return InvalidRequest(field, message.removeprefix(f"{field}: ") if field else message)
    cls = _BY_CODE.get(code)
    if cls is None:
        return InternalError(f"{code.name}: {message}")
    if issubclass(cls, _Retryable) and retry_after is not None:
        return cls(message, retry_after)
    return cls(message)


def _cut(message: str) -> str:
    encoded = message.encode(errors="replace")
    if len(encoded) > MAX_STATUS_MESSAGE_BYTES:
        encoded = encoded[: MAX_STATUS_MESSAGE_BYTES - 3] + b"..."
    return encoded.decode(errors="ignore")


def to_status(error: GrokmoeError) -> Any:
    """Renders an error as a gRPC status with google.rpc details (BadRequest, RetryInfo, ErrorInfo).

    Returns: what `context.abort_with_status` takes.
    """
    status = status_pb2.Status(code=error.code.value[0], message=_cut(error.message))
    details: list[Any] = [error_details_pb2.ErrorInfo(reason=error.code.name, domain=ERROR_DOMAIN)]
    if isinstance(error, InvalidRequest) and error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=_cut(error.description))
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if isinstance(error, _Retryable):
        delay = duration_pb2.Duration()
        delay.FromTimedelta(datetime.timedelta(seconds=error.retry_after))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return rpc_status.to_status(status)


def from_rpc_error(error: grpc.RpcError) -> GrokmoeError:
    """Turns what a gRPC call raised into an error of the tree, reading the google.rpc details if there are any."""
    call: Any = error
    try:
        field, retry_after = _read_details(rpc_status.from_call(call))
    except (ValueError, DecodeError):  # details of another status: a proxy or gRPC itself replaced the server's
        field, retry_after = "", None
    return _build(call.code(), call.details() or call.code().name, field, retry_after)


def _read_details(status: Any) -> tuple[str, float | None]:
    field, retry_after = "", None
    for detail in status.details if status is not None else ():
        bad_request, retry = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if detail.Unpack(bad_request) and bad_request.field_violations:
            field = bad_request.field_violations[0].field
        elif detail.Unpack(retry):
            retry_after = retry.retry_delay.ToTimedelta().total_seconds()
    return field, retry_after


def to_failure(error: Exception) -> failure_pb2.Failure:
    """Renders an error for a response on a stream that goes on. An error outside the tree is a bug: INTERNAL."""
    if not isinstance(error, GrokmoeError):
        error = InternalError(f"{type(error).__name__}: {error}")
    field = error.field if isinstance(error, InvalidRequest) else ""
    return failure_pb2.Failure(code=error.code.value[0], message=error.message, field=field)


def from_failure(failure: failure_pb2.Failure) -> GrokmoeError:
    """The inverse of `to_failure`."""
    code = _CODE_BY_NUMBER.get(failure.code, grpc.StatusCode.INTERNAL)
    return _build(code, failure.message, failure.field)
