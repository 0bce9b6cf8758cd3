"""Values between this process and the load processes it has started: a length, then the value pickled.

Only ever read from a pipe to a process of our own.
"""

from __future__ import annotations

import asyncio
import pickle
import struct
from typing import Any

LENGTH = struct.Struct("<Q")


def encode(value: Any) -> bytes:
    """One frame."""
    data = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    return LENGTH.pack(len(data)) + data


async def read(stream: asyncio.StreamReader) -> Any:
    """The next value. asyncio.IncompleteReadError: the other end is gone."""
    (length,) = LENGTH.unpack(await stream.readexactly(LENGTH.size))
    return pickle.loads(await stream.readexactly(length))
