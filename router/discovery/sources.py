"""Who is asked for addresses: nobody, a resolver, a file."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from grokmoe.errors import ConfigError, Unavailable
from router.discovery.addresses import STAGE_JOINT, parse_addresses

logger = logging.getLogger(__name__)

DNS_SCHEME = "dns:///"
FILE_SCHEME = "file:"

INTERVAL = 1.0
"""Seconds between two looks: a file costs one stat, a name one query to a resolver that caches."""

RESOLVE_TIMEOUT = 5.0
"""Seconds for a resolver to answer."""

ReadEntries = Callable[[Iterable[str]], list[str]]
"""Addresses as somebody wrote them -> as they are known. Raises ValueError for one that cannot be."""


class StaticSource:
    """One address."""

    def __init__(self, address: str) -> None:
        self._address = address

    async def find(self) -> list[str]:
        """The address."""
        return [self._address]


class DnsSource:
    """Every address of a name."""

    def __init__(self, target: str) -> None:
        """target: `name:port`. Raises ConfigError when it is not."""
        if STAGE_JOINT in target:
            raise ConfigError(
                f"{DNS_SCHEME}{target}: a name stands for workers that each hold all layers; stages of a pipeline are "
                f"named one by one, host:port{STAGE_JOINT}host:port"
            )
        name, _, port = target.rpartition(":")
        if not name or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ConfigError(f"{DNS_SCHEME}{target}: must be {DNS_SCHEME}name:port")
        self._name, self._port = name.strip("[]"), int(port)

    async def find(self) -> list[str]:
        """`address:port` of each, sorted: resolvers turn their answers round. Raises OSError."""
        resolving = asyncio.get_running_loop().getaddrinfo(self._name, self._port, type=socket.SOCK_STREAM)
        found = await asyncio.wait_for(resolving, RESOLVE_TIMEOUT)
        hosts = sorted({str(address[0]) for *_, address in found})
        return [f"[{host}]:{self._port}" if ":" in host else f"{host}:{self._port}" for host in hosts]


class FileSource:
    """A file that is read again when it is another one or was written to."""

    def __init__(self, path: str, read: ReadEntries = list) -> None:
        self._path, self._read_entries = Path(path), read
        self._seen: tuple[int, int, int] | None = None
        self._found: list[str] = []

    async def find(self) -> list[str]:
        """Its addresses. Raises OSError, or ValueError when it is not a list of them."""
        return await asyncio.to_thread(self._read)

    def _read(self) -> list[str]:
        # Looked at before it is read: what is written in between is found the next time.
        status = self._path.stat()
        mark = (status.st_mtime_ns, status.st_ino, status.st_size)
        if mark != self._seen:
            self._found, self._seen = self._read_entries(parse_addresses(self._path.read_text())), mark
        return self._found


class Sources:
    """Several sources as one list, in their order."""

    def __init__(self, entries: Sequence[str], read: ReadEntries = list) -> None:
        """entries: as in a setting, see above. read: what is made of addresses given one by one or in a file.

        Raises ConfigError for one that cannot be.
        """
        try:
            self._by_entry = {entry: _source(entry, read) for entry in entries}
            read(entry for entry in entries if isinstance(self._by_entry[entry], StaticSource))  # do they go together?
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self._found: dict[str, list[str]] = {}
        self._trouble: dict[str, str] = {}

    @property
    def may_change(self) -> bool:
        """Whether looking again can find anything else."""
        return not all(isinstance(source, StaticSource) for source in self._by_entry.values())

    async def find(self) -> list[str]:
        """All addresses. A source that cannot be asked, or has none, keeps those it had: a resolver that is away and
        a file that is half written are no reason to give up workers that answer."""
        for entry, source in self._by_entry.items():
            try:
                found = await source.find()
            except (OSError, ValueError) as error:  # TimeoutError is an OSError
                self._note(entry, f"{type(error).__name__}: {error}")
                continue
            self._note(entry, "" if found else "names no address")
            if found:
                self._found[entry] = found
        return list(dict.fromkeys(address for entry in self._by_entry for address in self._found.get(entry, ())))

    def _note(self, entry: str, trouble: str) -> None:
        """Logs what is wrong with a source once, not at every look."""
        if trouble and trouble != self._trouble.get(entry):
            logger.warning("%s: %s; keeping %s", entry, trouble, self._found.get(entry, "nothing"))
        self._trouble[entry] = trouble

    async def first(self, timeout: float, pause: float = INTERVAL) -> list[str]:
        """`find`, until every source has named an address. Raises Unavailable after `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                while True:
                    found = await self.find()
                    if len(self._found) == len(self._by_entry):
                        return found
                    await asyncio.sleep(pause)
        except TimeoutError:
            silent = ", ".join(entry for entry in self._by_entry if entry not in self._found)
            raise Unavailable(f"no address within {timeout:g} s from {silent}") from None


def _source(entry: str, read: ReadEntries) -> StaticSource | DnsSource | FileSource:
    if entry.startswith(DNS_SCHEME):
        return DnsSource(entry.removeprefix(DNS_SCHEME))
    if entry.startswith(FILE_SCHEME):
        return FileSource(entry.removeprefix(FILE_SCHEME), read)
    return StaticSource(*read([entry]))
