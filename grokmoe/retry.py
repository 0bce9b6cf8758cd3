"""Which failures of a call are worth another attempt, and when. Takes errors, returns seconds; sends nothing.

Only a call that failed before its first message is tried again, and only where the server says when (RetryInfo) or
could not be reached: UNAVAILABLE, and RESOURCE_EXHAUSTED with RetryInfo. An attempt that got DEADLINE_EXCEEDED or
INTERNAL may have cost a whole generation.

All of it is here and none in gRPC's service config: gRPC's retries know nothing of RetryInfo, so they would come back
sooner than the server asked for, and each attempt from here would be several there.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from grokmoe.errors import AlreadyExists, ConfigError, GrokmoeError, ResourceExhausted, Unavailable

FIRST_BACKOFF = 0.1
"""Seconds before the second attempt if the server did not say when; doubled for each further one."""

MAX_BACKOFF = 2.0
"""Most of them."""

JITTER = 0.25
"""A pause is longer by up to this share, so that clients that failed together do not come back together."""


class Attempts:
    """The attempts of one call, which share its deadline.

    After an attempt that was lost on the way, ALREADY_EXISTS means that the server has not noticed yet: it is the
    caller's own request id, and the server gives it back when it sees that the attempt's connection is gone. So then,
    and only then, it is worth another attempt too.
    """

    def __init__(
        self,
        retries: int,
        timeout: float,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        """retries: most attempts after the first. timeout: seconds for all together. draw: uniform in [0, 1)."""
        self._retries_left = retries
        self._clock, self._draw = clock, draw
        self._deadline = clock() + timeout
        self._backoff = FIRST_BACKOFF
        self._was_lost = False

    def remaining(self) -> float:
        """Seconds left to the next attempt."""
        return max(0.0, self._deadline - self._clock())

    def delay_after(self, error: GrokmoeError) -> float | None:
        """Seconds to wait before the next attempt; None: there is to be none, the error is the answer."""
        told = _retry_info(error.__cause__)
        is_worth_it = (
            isinstance(error, Unavailable)
            or (isinstance(error, ResourceExhausted) and told is not None)
            or (isinstance(error, AlreadyExists) and self._was_lost)
        )
        if not is_worth_it or self._retries_left <= 0:
            return None
        self._retries_left -= 1
        self._was_lost = self._was_lost or isinstance(error, Unavailable)
        delay = self._backoff if told is None else told
        self._backoff = min(2 * self._backoff, MAX_BACKOFF)
        delay *= 1 + JITTER * self._draw()
        return delay if delay < self.remaining() else None


def check_retries(retries: int) -> int:
    """ConfigError for a number that is none."""
    if retries < 0:
        raise ConfigError(f"retries is {retries}, must be at least 0")
    return retries


def _retry_info(error: BaseException | None) -> float | None:
    """The delay in the status details of what a gRPC call raised, seconds; None if it has none."""
    if not isinstance(error, grpc.RpcError):
        return None
    call: Any = error
    try:
        status = rpc_status.from_call(call)
    except (ValueError, DecodeError):  # details of another status: a proxy replaced the server's
        return None
    retry = error_details_pb2.RetryInfo()
    for detail in status.details if status is not None else ():
        if detail.Unpack(retry):
            seconds: float = retry.retry_delay.ToTimedelta().total_seconds()
            return max(0.0, seconds)
    return None
