"""How a client proves who it is, and learns that the server is who it should be."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import grpc

from grokmoe.errors import ConfigError

Pem = str | Path | bytes
"""A file in PEM format: its path, or its bytes."""

Token = str | Callable[[], str]
"""A bearer token, or what returns one; it is asked before every attempt of a call, on the event loop."""

MetadataMap = Mapping[str, str | bytes]
Metadata = MetadataMap | Callable[[], MetadataMap]
"""What goes with every call, such as traceparent; or what returns it, asked before every attempt, on the event loop.

Values are printable ASCII; of a name that ends in `-bin`, bytes."""


@dataclasses.dataclass(frozen=True)
class TlsConfig:
    """What a TLS connection needs. With certificate and key the server can ask who the client is (mutual TLS).

    ca: certificates of who may vouch for the server; None: the authorities that gRPC brings along.
    certificate, key: the client's own, both or neither.
    server_name: name in the server's certificate, if it is not the one in the address; a list of addresses needs it.
    """

    ca: Pem | None = None
    certificate: Pem | None = None
    key: Pem | None = dataclasses.field(default=None, repr=False)
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ConfigError("tls: a client's certificate and its key go together")


@dataclasses.dataclass(frozen=True)
class CallMetadata:
    """What every call carries beside its message."""

    token: Token | None = dataclasses.field(default=None, repr=False)
    metadata: Metadata | None = None

    def build(self) -> tuple[tuple[str, str | bytes], ...]:
        """For one attempt. ConfigError: a name or value that cannot be sent."""
        entries: dict[str, str | bytes] = {}
        if self.metadata is not None:
            entries |= self.metadata() if callable(self.metadata) else self.metadata
        if self.token is not None:
            token = self.token() if callable(self.token) else self.token
            entries["authorization"] = f"Bearer {token.strip()}"  # a token from a file brings its line end
        return tuple((_checked_name(name), _checked_value(name, value)) for name, value in entries.items())


def channel_credentials(tls: TlsConfig) -> grpc.ChannelCredentials:
    """What a channel is opened with. Reads the files. ConfigError: cannot be read, or is not PEM."""
    ca, certificate, key = (_read(name, getattr(tls, name)) for name in ("ca", "certificate", "key"))
    return grpc.ssl_channel_credentials(ca, key, certificate)


def channel_options(tls: TlsConfig) -> tuple[tuple[str, str], ...]:
    """The channel options that go with it."""
    return () if tls.server_name is None else (("grpc.ssl_target_name_override", tls.server_name),)


def _read(name: str, pem: Pem | None) -> bytes | None:
    if pem is None:
        return None
    if not isinstance(pem, bytes):
        try:
            pem = Path(pem).read_bytes()
        except OSError as error:
            raise ConfigError(f"tls: {name} {error.filename}: {error.strerror}") from error
    if b"-----BEGIN " not in pem:
        raise ConfigError(f"tls: {name} is not in PEM format")
    return pem


def _checked_name(name: str) -> str:
    name = name.lower()
    if not name or not all(char in "abcdefghijklmnopqrstuvwxyz0123456789-_." for char in name):
        raise ConfigError(f"metadata: {name!r} is not a name")
    return name


def _checked_value(name: str, value: str | bytes) -> str | bytes:
    if name.lower().endswith("-bin"):
        if not isinstance(value, bytes):
            raise ConfigError(f"metadata: {name} must be bytes")
    elif not isinstance(value, str) or not (value.isascii() and value.isprintable()):
        raise ConfigError(f"metadata: {name} must be printable ASCII")  # not shown: it may be a secret
    return value
