"""What a gRPC call says of itself beside its message: who calls, how urgent it is, how long the caller waits."""

from __future__ import annotations

import time
from typing import Any

from grokmoe.caller import proven_caller
from grokmoe.errors import InvalidRequest
from grokmoe.tracing import TRACE_KEYS
from router.admission import CallContext
from router.fair_share import MAX_PRIORITY, MIN_PRIORITY

PRIORITY_KEY = "x-priority"
CALLER_KEY = "x-caller"
MAX_CALLER_LENGTH = 128
KEYS = frozenset({PRIORITY_KEY, CALLER_KEY, *TRACE_KEYS})


def read_call(context: Any) -> CallContext:
    """context: of a gRPC handler. Raises InvalidRequest for metadata that cannot be.

    A caller who has proven a name, by a token or a certificate, has that one; `x-caller` counts among those who need
    not prove any.
    """
    metadata = {key: value for key, value in context.invocation_metadata() or () if key in KEYS}
    remaining = context.time_remaining()
    caller = _proven(context) or str(metadata.get(CALLER_KEY, ""))
    if len(caller) > MAX_CALLER_LENGTH:
        raise InvalidRequest(CALLER_KEY, f"has {len(caller)} characters, limit is {MAX_CALLER_LENGTH}")
    return CallContext(
        caller=caller,
        priority=_priority(str(metadata.get(PRIORITY_KEY, "0"))),
        deadline=None if remaining is None else time.monotonic() + remaining,
        trace_context=tuple((key, str(metadata[key])) for key in TRACE_KEYS if key in metadata),
    )


def _proven(context: Any) -> str:
    caller = proven_caller()
    if caller is not None:
        return caller
    names = context.peer_identities()  # of the certificate, which TLS has checked: its first alternative name
    return names[0].decode(errors="replace")[:MAX_CALLER_LENGTH] if names else ""


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
