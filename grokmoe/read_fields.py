"""From a message to a dataclass with the same field names."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

T = TypeVar("T")


def read_fields(kind: type[T], message: Any, **converted: Any) -> T:
    """Builds `kind` from the message's fields of the same names; `converted` has those that differ in type."""
    names = [field.name for field in dataclasses.fields(kind) if field.name not in converted]  # type: ignore[arg-type]
    return kind(**{name: getattr(message, name) for name in names}, **converted)
