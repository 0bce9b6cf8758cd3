"""Who makes the call that is being answered, once that has been proven.

It is a context variable because a handler's context in gRPC has no room for it: the interceptor that proves it
(grokmoe.authentication) and the handler run in one task, and every call has a task of its own.
"""

from __future__ import annotations

from contextvars import ContextVar

_caller: ContextVar[str | None] = ContextVar("grokmoe_caller", default=None)


def proven_caller() -> str | None:
    """The caller's name; None where nobody has to prove it."""
    return _caller.get()


def set_proven_caller(name: str) -> None:
    """For the rest of this task."""
    _caller.set(name)
