"""Bearer tokens on the server's side: an interceptor that lets a call through, or ends it before it is read.

It works once per call and leaves the handler as it is, so messages of a stream cost nothing more. A refused caller's
message is not even decoded, and it is not told whether the method exists.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextvars import ContextVar
from typing import Any

import grpc

from grokmoe.access import AccessTable, Grant, Scope
from grokmoe.caller import set_proven_caller
from grokmoe.errors import GrokmoeError, PermissionDenied, Unauthenticated
from grokmoe.status import to_status
from grokmoe.watched_file import WatchedFiles

logger = logging.getLogger(__name__)

AUTHORIZATION_KEY = "authorization"
_SCHEME = "bearer"

_granted: ContextVar[frozenset[Scope] | None] = ContextVar("grokmoe_scopes", default=None)


def has_scope(scope: Scope) -> bool:
    """Whether the call that is being answered may do what needs this scope. All may where nobody needs a token.

    For what depends on the message; what a whole method needs is looked at before it is called.
    """
    granted = _granted.get()
    return granted is None or scope in granted


class Authentication(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Compares every call's token with those of a file."""

    def __init__(
        self,
        table: WatchedFiles[AccessTable],
        scopes: Mapping[str, Scope],
        exempt: Collection[str] = (),
        refused: Callable[[str], None] = lambda code: None,
    ) -> None:
        """scopes: of services and of single methods, by name: `grokmoe.v1.Control`, `/grokmoe.v1.Control/Abort`. What
        is not in it any known token may call.
        exempt: services whose callers are not asked. refused: told the code's name of each refusal, for a counter.
        """
        self._table, self._scopes, self._exempt, self._refused = table, dict(scopes), frozenset(exempt), refused

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        """See grpc.aio.ServerInterceptor."""
        method: Any = details.method
        service = method[1:].rpartition("/")[0]
        if service in self._exempt:
            return await continuation(details)
        try:
            grant = self.prove(method, details.invocation_metadata)
        except GrokmoeError as error:
            return ending_with(error)
        set_proven_caller(grant.caller)
        _granted.set(grant.scopes)
        return await continuation(details)

    def prove(self, method: str, metadata: Any) -> Grant:
        """What the token that goes with a call stands for. Raises Unauthenticated, PermissionDenied, and counts it."""
        needed = self._scopes.get(method, self._scopes.get(method[1:].rpartition("/")[0]))
        try:
            return self._find(metadata, needed)
        except GrokmoeError as error:
            self._refused(error.code.name)
            logger.debug("%r refused: %s", method[:128], error.code.name)  # anyone could fill the log with these
            raise

    def _find(self, metadata: Any, needed: Scope | None) -> Grant:
        """No message quotes what was sent."""
        given = [value for key, value in metadata or () if key == AUTHORIZATION_KEY]
        if not given:
            raise Unauthenticated("this call needs a bearer token")
        scheme, _, token = given[0].partition(" ") if isinstance(given[0], str) else ("", "", "")
        grant = self._table.get().find(token.strip()) if scheme.lower() == _SCHEME else None
        if grant is None or len(given) > 1:
            raise Unauthenticated("the token is not known here")
        if needed is not None and needed not in grant.scopes:
            raise PermissionDenied(f"the token of {grant.caller} is not for {needed}")
        return grant


def ending_with(error: GrokmoeError) -> Any:
    """A handler for any kind of method: as a stream of bytes both ways, it needs no message to begin."""

    async def refuse(requests: Any, context: Any) -> None:
        await context.abort_with_status(to_status(error))

    return grpc.stream_stream_rpc_method_handler(refuse)
