"""Values between this process and the load processes it has started: a length, then JSON.

A value is what JSON has, an instance of one of KINDS, which goes as {"kind": its name, and its fields}, or a sequence.
Sequences come back as tuples, but where a field of the kind is a list.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import struct
from pathlib import Path
from typing import Any

from grokmoe import TlsConfig
from loadtest.job import Counts, Go, Job
from loadtest.planned import PlannedRequest
from loadtest.record import Outcome, RequestRecord

LENGTH = struct.Struct("<Q")

_KINDS = (Counts, Go, Job, PlannedRequest, RequestRecord, TlsConfig)
KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in _KINDS}


def encode(value: Any) -> bytes:
    """One frame."""
    data = json.dumps(value, default=_fields, separators=(",", ":")).encode()
    return LENGTH.pack(len(data)) + data


async def read(stream: asyncio.StreamReader) -> Any:
    """The next value. asyncio.IncompleteReadError: the other end is gone."""
    (length,) = LENGTH.unpack(await stream.readexactly(LENGTH.size))
    return _tupled(json.loads(await stream.readexactly(length), object_hook=_value))


def _fields(value: Any) -> str | dict[str, Any]:
    if isinstance(value, Path):
        return str(value)
    return {"kind": type(value).__name__} | {
        field.name: getattr(value, field.name) for field in dataclasses.fields(value)
    }


def _value(fields: dict[str, Any]) -> Any:
    kind = KINDS.get(fields.pop("kind", ""))
    if kind is None:
        return {name: _tupled(value) for name, value in fields.items()}
    if kind is RequestRecord:
        return RequestRecord(**fields | {"outcome": Outcome(fields["outcome"])})
    return kind(**{name: _tupled(value) for name, value in fields.items()})


def _tupled(value: Any) -> Any:
    return tuple(map(_tupled, value)) if isinstance(value, list) else value
