"""Settings that say who may call a process, and what a caller may cost. docs/security.md explains them."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any, TypeVar

import grpc

from grokmoe.access import AccessTable, watch_access
from grokmoe.channel import MAX_MESSAGE_BYTES
from grokmoe.errors import ConfigError
from grokmoe.server_tls import server_credentials
from grokmoe.settings import setting
from grokmoe.target import parse_target
from grokmoe.watched_file import WatchedFiles

logger = logging.getLogger(__name__)

REFLECTION = ("guarded", "open", "off")

S = TypeVar("S", bound="SecuritySettings")


@dataclasses.dataclass(frozen=True)
class SecuritySettings:
    """What every serving process has. Secrets are files, never values: flags and environment are seen by others."""

    tls_certificate: str = setting("", "PEM file with the server's certificate chain; empty: no TLS", metavar="FILE")
    tls_key: str = setting("", "PEM file with its key", metavar="FILE")
    tls_client_ca: str = setting(
        "", "PEM file with the authorities that issue callers' certificates; callers must show one", metavar="FILE"
    )
    tokens_file: str = setting(
        "",
        "file of the bearer tokens that callers may use, lines name:scopes:token; empty: none needed",
        metavar="FILE",
    )
    reflection: str = setting(
        "guarded", "server reflection: with a token like all calls, without, not at all", REFLECTION
    )
    health_listen: str = setting("", "second address, in the clear, that serves health and nothing else")
    max_calls: int = setting(
        2048, "calls at the same time on one connection; more wait in the client or get UNAVAILABLE"
    )
    max_connection_age: float = setting(
        0.0, "seconds after which a connection gets no new calls, so that callers spread anew; 0: never"
    )

    max_request_mb: int = setting(
        4, "MiB of one message from a client, at most 64; long prompts as inputs_embeds need more than the default"
    )

    def __post_init__(self) -> None:
        if bool(self.tls_certificate) != bool(self.tls_key):
            raise ConfigError("tls_certificate and tls_key go together")
        if self.tls_client_ca and not self.tls_certificate:
            raise ConfigError("tls_client_ca needs tls_certificate and tls_key")
        if self.max_calls < 1:
            raise ConfigError(f"max_calls is {self.max_calls}, must be at least 1")
        if not self.max_connection_age >= 0:
            raise ConfigError(f"max_connection_age is {self.max_connection_age}, must be at least 0")
        most = MAX_MESSAGE_BYTES >> 20
        if not 1 <= self.max_request_mb <= most:
            raise ConfigError(f"max_request_mb is {self.max_request_mb}, must be from 1 to {most}")

    @property
    def is_open(self) -> bool:
        """Whether a client needs neither TLS nor a token."""
        return not self.tls_certificate and not self.tokens_file

    def credentials(self) -> grpc.ServerCredentials | None:
        """What to listen with; None: in the clear. Raises ConfigError."""
        if not self.tls_certificate:
            return None
        return server_credentials(self.tls_certificate, self.tls_key, self.tls_client_ca)

    def access(self) -> WatchedFiles[AccessTable] | None:
        """The tokens; None: nobody is asked for one. Raises ConfigError."""
        return watch_access(self.tokens_file) if self.tokens_file else None

    def channel_options(self, is_client_facing: bool) -> tuple[tuple[str, int], ...]:
        """Options of the server's connections. is_client_facing: callers are not the cluster's own."""
        options = [("grpc.max_concurrent_streams", self.max_calls)]
        if is_client_facing:
            options.append(("grpc.max_receive_message_length", self.max_request_mb << 20))
        if self.max_connection_age:
            options.append(("grpc.max_connection_age_ms", int(self.max_connection_age * 1000)))
        return tuple(options)

    def security(self) -> dict[str, Any]:
        """The fields of this class by name, to hand them on to other settings that have them."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(SecuritySettings)}

    def warn(self, listen: str) -> None:
        """Says what is open to a network that it should perhaps not be open to."""
        if parse_target(listen).is_local:
            return
        if not self.tls_client_ca and not self.tokens_file:
            logger.warning("everyone who reaches %s may call: neither tls_client_ca nor tokens_file is set", listen)
        elif not self.tls_certificate:
            logger.warning("tokens cross the network to %s in the clear: tls_certificate is not set", listen)
