"""Who may call what: bearer tokens in a file, each with a name and scopes.

A line of the file is `token`, `name:token` or `name:scopes:token`; scopes are joined by `+`. Without scopes a token is
for inference. Empty lines and lines that begin with # are passed over. Two tokens may have one name, so that a token
can be replaced by another without a gap.

    # who      what                 token
    alice:5b1e…
    operator:inference+control:90ac…
    router:cluster:e71d…
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import hmac
import re
from collections.abc import Sequence
from pathlib import Path

from grokmoe.errors import ConfigError
from grokmoe.watched_file import WatchedFiles

MIN_TOKEN_LENGTH = 16
"""Shorter ones can be guessed over the network. `openssl rand -hex 32` makes one of 64."""

_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")  # what an Authorization header can carry: RFC 6750, section 2.1
_NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")


class Scope(enum.StrEnum):
    """What a token is good for. Every service has one, and so may single methods (grokmoe.server.Service)."""

    INFERENCE = "inference"
    """To generate, score, tokenise."""
    CONTROL = "control"
    """To see the cluster's state, and to end requests of others."""
    CLUSTER = "cluster"
    """To use workers: what a router has."""


@dataclasses.dataclass(frozen=True)
class Grant:
    """What a token stands for. caller: its name; of a token without one, its line."""

    caller: str
    scopes: frozenset[Scope]


class AccessTable:
    """The tokens of one file. Keeps their digests only."""

    def __init__(self, grants: Sequence[tuple[str, Grant]]) -> None:
        """grants: token and what it stands for."""
        self._grants = tuple((_digest(token), grant) for token, grant in grants)

    def find(self, token: str) -> Grant | None:
        """What a token stands for; None if it is not known. Takes equally long whatever the token."""
        digest, found = _digest(token), None
        for known, grant in self._grants:  # all of them: where it stands must not show either
            if hmac.compare_digest(known, digest):
                found = grant
        return found


def parse_grants(text: bytes) -> list[tuple[str, Grant]]:
    """Token and grant of each line. Raises ConfigError naming the line; it never quotes one."""
    grants: dict[str, Grant] = {}
    for number, line in enumerate(text.decode(errors="replace").splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        *before, token = line.split(":")
        name = before[0] if before else f"line-{number}"
        scopes = before[1] if len(before) > 1 else Scope.INFERENCE
        if len(before) > 2:
            raise ConfigError(f"line {number}: has more than name:scopes:token")
        if not _NAME.fullmatch(name):
            raise ConfigError(f"line {number}: the name must have 1 to 64 letters, digits or . _ @ -")
        if not _TOKEN.fullmatch(token) or len(token) < MIN_TOKEN_LENGTH:
            raise ConfigError(f"line {number}: the token needs {MIN_TOKEN_LENGTH} or more letters, digits or -._~+/")
        if token in grants:
            raise ConfigError(f"line {number}: its token is that of an earlier line")
        grants[token] = Grant(name, _scopes(scopes, number))
    if not grants:
        raise ConfigError("holds no token")
    return list(grants.items())


def _scopes(text: str, number: int) -> frozenset[Scope]:
    try:
        return frozenset(Scope(part) for part in text.split("+"))
    except ValueError:
        raise ConfigError(f"line {number}: scopes are {', '.join(Scope)}, joined by +") from None


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="replace")).digest()


def watch_access(path: str | Path) -> WatchedFiles[AccessTable]:
    """The table of a file, read again when it changes. Raises ConfigError."""
    return WatchedFiles((path,), lambda parts: AccessTable(_named(path, parts[0])), "tokens_file")


def watch_token(path: str | Path, what: str) -> WatchedFiles[str]:
    """The token that we send: the first in a file of the same form. what: name of the setting. Raises ConfigError."""
    return WatchedFiles((path,), lambda parts: _named(path, parts[0], what)[0][0], what)


def _named(path: str | Path, text: bytes, what: str = "tokens_file") -> list[tuple[str, Grant]]:
    try:
        return parse_grants(text)
    except ConfigError as error:
        raise ConfigError(f"{what} {path}: {error.message}") from None
