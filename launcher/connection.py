"""How commands that are clients reach the service."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from grokmoe import ClientOptions, ConfigError, TlsConfig
from grokmoe.settings import setting
from launcher.paths import DEFAULT_ADDRESS


@dataclasses.dataclass(frozen=True)
class ConnectionSettings:
    """Where the service is, and what it wants to see."""

    address: str = setting(DEFAULT_ADDRESS, "where the service is; several, with commas, take turns")
    tls: bool = setting(False, "connect with TLS")
    tls_ca: str | None = setting(None, "who may vouch for the server; default: well-known authorities", metavar="FILE")
    tls_certificate: str | None = setting(None, "our certificate, if the server asks who we are", metavar="FILE")
    tls_key: str | None = setting(None, "its key", metavar="FILE")
    tls_server_name: str | None = setting(None, "name in its certificate, if not the address's", metavar="NAME")
    token_file: str | None = setting(None, "file with the bearer token of every call", metavar="FILE")

    def client_options(self) -> ClientOptions:
        """What to make a client with. ConfigError: the token cannot be read."""
        tls = TlsConfig(self.tls_ca, self.tls_certificate, self.tls_key, self.tls_server_name)
        return {"tls": tls if self.tls or tls != TlsConfig() else None, "token": self._token()}

    def _token(self) -> str | None:
        if self.token_file is None:
            return None
        try:
            return Path(self.token_file).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"token_file {self.token_file}: {error}") from error
