"""How the errors of grokmoe/errors.py travel: as gRPC statuses with google.rpc details, or in-band as a Failure."""

from __future__ import annotations

import dataclasses
import datetime
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from grokmoe.errors import (
    AlreadyExists,
    Cancelled,
    Code,
    DeadlineExceeded,
    FailedPrecondition,
    GrokmoeError,
    InternalError,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    Reason,
    ResourceExhausted,
    Retryable,
    Unauthenticated,
    Unavailable,
)
from grokmoe.v1 import failure_pb2

ERROR_DOMAIN = "grokmoe"

MAX_STATUS_MESSAGE_BYTES = 1024
"""A longer message is cut. It travels three times in the call's trailers, once percent-encoded, and trailers above
8 KiB turn the call's status into RESOURCE_EXHAUSTED."""

_BY_CODE: dict[int, type[GrokmoeError]] = {
    cls.code: cls
    for cls in (
        NotFound,
        AlreadyExists,
        ResourceExhausted,
        Unavailable,
        Unauthenticated,
        PermissionDenied,
        FailedPrecondition,
        DeadlineExceeded,
        Cancelled,
        InternalError,
    )
}


@dataclasses.dataclass(frozen=True)
class _Details:
    """What the details of a status say; None: nothing."""

    field: str = ""
    retry_after: float | None = None
    reason: Reason | None = None


def _build(number: int, name: str, message: str, details: _Details) -> GrokmoeError:
    """number, name: of the gRPC code, which may be one we never send ourselves."""
    if number == Code.INVALID_ARGUMENT:
        text = message.removeprefix(f"{details.field}: ") if details.field else message
        return InvalidRequest(details.field, text, reason=details.reason)
    cls = _BY_CODE.get(number)
    if cls is None:
        return InternalError(f"{name}: {message}", reason=details.reason)
    if issubclass(cls, Retryable) and details.retry_after is not None:
        return cls(message, details.retry_after, reason=details.reason)
    return cls(message, reason=details.reason)


def _reason(text: str) -> Reason | None:
    return Reason(text) if text in Reason.__members__ else None


def _cut(message: str) -> str:
    encoded = message.encode(errors="replace")
    if len(encoded) > MAX_STATUS_MESSAGE_BYTES:
        encoded = encoded[: MAX_STATUS_MESSAGE_BYTES - 3] + b"..."
    return encoded.decode(errors="ignore")


def to_status(error: GrokmoeError) -> Any:
    """Renders an error as a gRPC status with google.rpc details (BadRequest, RetryInfo, ErrorInfo).

    Returns: what `context.abort_with_status` takes.
    """
    status = status_pb2.Status(code=error.code, message=_cut(error.message))
    details: list[Any] = [error_details_pb2.ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN)]
    if isinstance(error, InvalidRequest) and error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=_cut(error.description))
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if isinstance(error, Retryable):
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
        details = _read_details(rpc_status.from_call(call))
    except (ValueError, DecodeError):  # details of another status: a proxy or gRPC itself replaced the server's
        details = _Details()
    code = call.code()
    return _build(code.value[0], code.name, call.details() or code.name, details)


def _read_details(status: Any) -> _Details:
    found: dict[str, Any] = {}
    for detail in status.details if status is not None else ():
        bad_request, retry = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(bad_request) and bad_request.field_violations:
            found["field"] = bad_request.field_violations[0].field
        elif detail.Unpack(retry):
            found["retry_after"] = retry.retry_delay.ToTimedelta().total_seconds()
        elif detail.Unpack(info) and info.domain == ERROR_DOMAIN:
            found["reason"] = _reason(info.reason)
    return _Details(**found)


def to_failure(error: Exception) -> failure_pb2.Failure:
    """Renders an error for a response on a stream that goes on. An error outside the tree is a bug: INTERNAL."""
    if not isinstance(error, GrokmoeError):
        error = InternalError(f"{type(error).__name__}: {error}")
    field = error.field if isinstance(error, InvalidRequest) else ""
    return failure_pb2.Failure(code=error.code, message=error.message, field=field, reason=error.reason)


def from_failure(failure: failure_pb2.Failure) -> GrokmoeError:
    """The inverse of `to_failure`."""
    details = _Details(field=failure.field, reason=_reason(failure.reason))
    return _build(failure.code, f"code {failure.code}", failure.message, details)
