"""How the router proves to workers who it is, and they to it: what every channel to a worker is opened with."""

from __future__ import annotations

import dataclasses
import logging
import os
import socket
import uuid
import weakref
from pathlib import Path
from typing import Any

import grpc

from grokmoe.access import watch_token
from grokmoe.channel import RECONNECT_OPTIONS, open_channel
from grokmoe.credentials import TlsConfig, channel_credentials, channel_options
from grokmoe.errors import ConfigError
from grokmoe.local_streams import LocalCall, find_socket
from grokmoe.settings import setting
from grokmoe.target import parse_target
from grokmoe.watched_file import WatchedFiles

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class WorkerAccessSettings:
    """Where the cluster's identity lies; all empty: workers are called in the clear and without a token."""

    worker_tls_ca: str = setting("", "PEM file: who may vouch for workers; empty: no TLS", metavar="FILE")
    worker_tls_certificate: str = setting("", "PEM file: our certificate, if workers ask for one", metavar="FILE")
    worker_tls_key: str = setting("", "PEM file with its key", metavar="FILE")
    worker_tls_server_name: str = setting("", "name in workers' certificates, if not the address's", metavar="NAME")
    worker_token_file: str = setting("", "file with the token that workers ask for", metavar="FILE")
    local_streams: bool = setting(True, "send rows to workers on this host past gRPC, where they offer it")


def new_router_id() -> str:
    """Who calls, unique and readable: host, process, and a part drawn at random."""
    return f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


class WorkerAccess:
    """Opens channels to workers. One for all of them. caller: what expert workers know this router by."""

    def __init__(self, settings: WorkerAccessSettings | None = None) -> None:
        """Raises ConfigError for files that cannot be used."""
        s = settings or WorkerAccessSettings()
        self._tls: WatchedFiles[TlsConfig] | None = None
        if s.worker_tls_ca:
            self._tls = _watch_tls(s)
        elif s.worker_tls_certificate or s.worker_tls_key or s.worker_tls_server_name:
            raise ConfigError("worker_tls_ca is missing: who may vouch for workers")
        self._token = watch_token(s.worker_token_file, "worker_token_file") if s.worker_token_file else None
        self._has_local_streams = s.local_streams
        self.caller = new_router_id()

    @property
    def tls(self) -> TlsConfig | None:
        """What the files say now; the same object until they change. None: no TLS."""
        return self._tls.get() if self._tls else None

    def metadata(self) -> tuple[tuple[str, str], ...] | None:
        """What goes with a call."""
        return (("authorization", f"Bearer {self._token.get()}"),) if self._token else None

    def local_stream(self, address: str, method: str) -> LocalCall | None:
        """A stream past gRPC to a worker that is on this host, offers it, and is called in the clear."""
        path = find_socket(address) if self._has_local_streams and self._tls is None else None
        return None if path is None else LocalCall(path, method, dict(self.metadata() or ()).get("authorization", ""))

    def open(self, address: str) -> WorkerChannel:
        """A channel on the running event loop; nothing is sent."""
        if self._token and not self._tls and not parse_target(address).is_local:
            logger.warning("the token crosses the network to %s in the clear: worker_tls_ca is not set", address)
        return WorkerChannel(address, self)


class WorkerChannel:
    """A connection to one worker. After its certificates have been replaced, new calls go over a new connection.

    gRPC's channels keep the credentials that they were opened with. Calls that are under way stay on the old one.
    """

    def __init__(self, address: str, access: WorkerAccess) -> None:
        self._address, self._access, self.caller = address, access, access.caller
        self._tls = access.tls
        self._channel = self._open()
        self._old: list[tuple[grpc.aio.Channel, weakref.WeakSet[Any]]] = []
        self._calls: weakref.WeakSet[Any] = weakref.WeakSet()

    def stream(self, method: str) -> Any:
        """A bidirectional call of raw bytes. method: `/service/method`."""
        local = self._access.local_stream(self._address, method)
        if local is not None:
            return local
        channel: Any = self._current()  # grpc-stubs knows neither raw bytes nor the read/write style
        call = channel.stream_stream(method)(metadata=self._access.metadata())
        self._calls.add(call)
        return call

    async def unary(self, method: str, request: Any, response: Any, timeout: float) -> Any:
        """A unary call. request: message; response: type of the answer."""
        call = self._current().unary_unary(method, request.SerializeToString, response.FromString)
        return await call(request, timeout=timeout, metadata=self._access.metadata())

    async def close(self, grace: float | None = None) -> None:
        """Ends all calls."""
        for channel, _ in self._old:
            await channel.close(grace)
        await self._channel.close(grace)

    def _open(self) -> grpc.aio.Channel:
        if self._tls is None:
            return open_channel(self._address, RECONNECT_OPTIONS)
        options = (*RECONNECT_OPTIONS, *channel_options(self._tls))
        return open_channel(self._address, options, channel_credentials(self._tls))

    def _current(self) -> grpc.aio.Channel:
        tls = self._access.tls
        if tls is not self._tls:
            self._old = [(channel, calls) for channel, calls in self._old if any(not call.done() for call in calls)]
            self._old.append((self._channel, self._calls))
            self._tls, self._calls = tls, weakref.WeakSet()
            self._channel = self._open()
        return self._channel


PLAIN: WorkerAccess = WorkerAccess()
"""In the clear, without a token: workers on this host."""


def _watch_tls(s: WorkerAccessSettings) -> WatchedFiles[TlsConfig]:
    paths: tuple[str | Path, ...] = (s.worker_tls_ca,)
    if s.worker_tls_certificate or s.worker_tls_key:
        paths += (s.worker_tls_certificate, s.worker_tls_key)
    if not all(map(str, paths)):
        raise ConfigError("worker_tls_certificate and worker_tls_key go together")

    def read(parts: tuple[bytes, ...]) -> TlsConfig:
        ca, *own = parts
        certificate, key = own or (None, None)
        tls = TlsConfig(ca, certificate, key, s.worker_tls_server_name or None)
        channel_credentials(tls)  # complains of what is no certificate
        return tls

    return WatchedFiles(paths, read, "worker_tls_ca, worker_tls_certificate, worker_tls_key")
