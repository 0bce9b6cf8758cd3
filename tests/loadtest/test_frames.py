"""What goes to a load process and comes back is what was sent."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from grokmoe import TlsConfig
from loadtest import frames
from loadtest.job import Counts, Go, Job
from loadtest.planned import PlannedRequest
from loadtest.record import Outcome, RequestRecord

PLAN = (PlannedRequest(0, 0.25, (1, 2, 3), 8), PlannedRequest(1, 0.5, 'a "text"\n\u00e4', 4, leave_after=2))
RECORD = RequestRecord(3, 0.1, arrivals=[0.125, 0.3], counts=[1, 2], outcome=Outcome.FAILED, message="no")


def there_and_back(value: Any) -> Any:
    async def go() -> Any:
        stream = asyncio.StreamReader()
        stream.feed_data(frames.encode(value))
        stream.feed_eof()
        return await frames.read(stream)

    return asyncio.run(go())


@pytest.mark.parametrize(
    "value",
    [
        "ready",
        Counts(1, 2, 3, 4, 0.5),
        Go(12.75, PLAN, is_closed=True),
        Job("127.0.0.1:1", {"timeout": 3.5, "tls": TlsConfig("ca.pem", server_name="here"), "token": "t"}, {}, ""),
        Job("127.0.0.1:1", {}, {"temperature": 0.7, "stop": ("a", "b"), "seed": None}, "id-", 4),
        (RECORD, RECORD),
    ],
)
def test_values(value: Any) -> None:
    assert there_and_back(value) == value


def test_the_other_end_is_gone() -> None:
    async def go() -> None:
        stream = asyncio.StreamReader()
        stream.feed_data(frames.encode("ready")[:-1])
        stream.feed_eof()
        await frames.read(stream)

    with pytest.raises(asyncio.IncompleteReadError):
        asyncio.run(go())
