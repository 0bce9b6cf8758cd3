"""TLS on the server's side: certificate and key from files, and who may vouch for callers. Files may be replaced."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import grpc

from grokmoe.errors import ConfigError
from grokmoe.watched_file import WatchedFiles


def server_credentials(certificate: str, key: str, client_ca: str = "") -> grpc.ServerCredentials:
    """What a server listens with: paths of PEM files.

    client_ca: callers must show a certificate that one of these authorities has issued; empty: they show none.

    Every handshake uses the files as they are then; connections that stand are not touched. Raises ConfigError for
    files that cannot be read or do not fit together; when that happens later the old ones stay.
    """
    paths = (certificate, key, *((client_ca,) if client_ca else ()))

    def configuration(parts: tuple[bytes, ...]) -> Any:
        _check(*paths)
        chain, private, *authorities = parts
        return grpc.ssl_server_certificate_configuration(
            [(private, chain)], root_certificates=authorities[0] if authorities else None
        )

    files: WatchedFiles[Any] = WatchedFiles(paths, configuration, "tls_certificate, tls_key, tls_client_ca")
    # The function is asked at every handshake, on a thread of gRPC's.
    return grpc.dynamic_ssl_server_credentials(files.get(), files.get, require_client_authentication=bool(client_ca))


def _check(certificate: str, key: str, client_ca: str = "") -> None:
    """gRPC would take anything here and then refuse every caller. Raises ConfigError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # A key with a password must not make anyone wait at a terminal.
        context.load_cert_chain(certificate, key, password="")
    except (OSError, ValueError) as error:
        raise ConfigError(f"tls_certificate {certificate} with tls_key {key}: {_reason(error)}") from error
    if client_ca:
        try:
            context.load_verify_locations(cadata=Path(client_ca).read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"tls_client_ca {client_ca}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Without quoting what was read."""
    if isinstance(error, ssl.SSLError):
        return error.reason or "not in PEM format"
    return error.strerror or "cannot be read" if isinstance(error, OSError) else "not in PEM format"
