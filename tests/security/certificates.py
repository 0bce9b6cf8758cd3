"""Certificates made for a test, as files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import trustme

from grokmoe import TlsConfig


@dataclasses.dataclass(frozen=True)
class Pair:
    """Paths of a certificate and its key."""

    certificate: str
    key: str


class Authority:
    """One that vouches for others. `ca`: path of its certificate."""

    def __init__(self, directory: Path, name: str = "ca") -> None:
        self._directory, self._name, self._authority = directory, name, trustme.CA()
        self.ca = str(directory / f"{name}.pem")
        self._authority.cert_pem.write_to_path(self.ca)

    def issue(self, name: str, *more: str) -> Pair:
        """Writes a certificate of these names and its key; over the earlier ones of this name."""
        cert = self._authority.issue_cert(name, *more)
        pair = Pair(
            str(self._directory / f"{self._name}-{name}.pem"), str(self._directory / f"{self._name}-{name}.key")
        )
        cert.private_key_pem.write_to_path(pair.key)
        Path(pair.certificate).write_bytes(b"".join(pem.bytes() for pem in cert.cert_chain_pems))
        return pair

    def server(self) -> Pair:
        """For a server on loopback."""
        return self.issue("localhost", "127.0.0.1")

    def client(self, own: Pair | None = None) -> TlsConfig:
        """What a client trusts, and shows if it has something to show."""
        return TlsConfig(self.ca, own.certificate if own else None, own.key if own else None)
