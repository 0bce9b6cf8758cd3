"""What a gRPC call says of itself beside its message: who calls, how urgent it is, how long the caller waits."""

from __future__ import annotations

import time
from typing import Any

from grokmoe.errors import InvalidRequest
from router.admission import CallContext
from router.fair_share import MAX_PRIORITY, MIN_PRIORITY

PRIORITY_KEY = "x-priority"
CALLER_KEY = "x-caller"
MAX_CALLER_LENGTH = 128


def read_call(context: Any) -> CallContext:
    """context: of a gRPC handler. Raises InvalidRequest for metadata that cannot be."""
    metadata = {key: value for key, value in context.invocation_metadata() or () if key in (PRIORITY_KEY, CALLER_KEY)}
    remaining = context.time_remaining()
    caller = str(metadata.get(CALLER_KEY, ""))
    if len(caller) > MAX_CALLER_LENGTH:
        raise InvalidRequest(CALLER_KEY, f"has {len(caller)} characters, limit is {MAX_CALLER_LENGTH}")
    return CallContext(
        caller=caller,
        priority=_priority(str(metadata.get(PRIORITY_KEY, "0"))),
        deadline=None if remaining is None else time.monotonic() + remaining,
    )


def _priority(text: str) -> int:
    try:
        priority = int(text)
    except ValueError:
        priority = MAX_PRIORITY + 1
    if not MIN_PRIORITY <= priority <= MAX_PRIORITY:
        raise InvalidRequest(
            PRIORITY_KEY, f"is {text[:32]!r}, must be a whole number from {MIN_PRIORITY} to {MAX_PRIORITY}"
        )
    return priority
