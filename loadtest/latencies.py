"""The latencies of one request. The formulas are written out for `--explain` in `loadtest/explain.py`.

Seconds; None where a request has no such latency: it did not complete, or had too few tokens.
"""

from __future__ import annotations

import itertools

from loadtest.record import Outcome, RequestRecord


def ttft(record: RequestRecord) -> float | None:
    """Time to first token, from when the request should have been sent."""
    return record.arrivals[0] - record.scheduled if _has_tokens(record) else None


def ttft_sent(record: RequestRecord) -> float | None:
    """The same from when it was sent."""
    return record.arrivals[0] - record.sent if _has_tokens(record) else None


def tpot(record: RequestRecord) -> float | None:
    """Time per output token after the first message's; None for a single message."""
    if not _has_tokens(record):
        return None
    num_after = record.output_len - record.counts[0]
    return (record.arrivals[-1] - record.arrivals[0]) / num_after if num_after else None


def itls(record: RequestRecord) -> list[float]:
    """Inter-token latencies: all gaps between two messages with tokens."""
    if record.outcome is not Outcome.COMPLETED:
        return []
    return [later - sooner for sooner, later in itertools.pairwise(record.arrivals)]


def e2el(record: RequestRecord) -> float | None:
    """End to end: the finish reason, from when the request should have been sent."""
    return record.end - record.scheduled if record.outcome is Outcome.COMPLETED else None


def e2el_sent(record: RequestRecord) -> float | None:
    """The same from when it was sent."""
    return record.end - record.sent if record.outcome is Outcome.COMPLETED else None


def ntpot(record: RequestRecord) -> float | None:
    """Normalised: end-to-end latency per output token."""
    whole = e2el(record)
    return whole / record.output_len if whole is not None and record.output_len else None


def server_queue(record: RequestRecord) -> float | None:
    """Arrival at the server to the first step, as the server measured it."""
    return record.server_queue if record.outcome is Outcome.COMPLETED else None


def client_queue_time(record: RequestRecord) -> float | None:
    """What `max_concurrency` made the request wait before it was sent."""
    return record.sent - record.woken if record.outcome is Outcome.COMPLETED else None


def cancel(record: RequestRecord) -> float | None:
    """Of a stream the client left: from when it was sent to when it was left."""
    return record.end - record.sent if record.outcome is Outcome.CANCELLED else None


PER_REQUEST = {
    "ttft": ttft,
    "ttft_sent": ttft_sent,
    "tpot": tpot,
    "e2el": e2el,
    "e2el_sent": e2el_sent,
    "ntpot": ntpot,
    "server_queue": server_queue,
    "client_queue_time": client_queue_time,
}
"""Name in the result to the latency; `itl`, which a request has several of, is beside them."""


def _has_tokens(record: RequestRecord) -> bool:
    return record.outcome is Outcome.COMPLETED and bool(record.arrivals)
