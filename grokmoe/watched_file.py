"""A file that is read again when it has changed, such as tokens and certificates that are replaced while we serve."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from grokmoe.errors import ConfigError

logger = logging.getLogger(__name__)

CHECK_INTERVAL = 1.0
"""Seconds between two looks at the file: how late a change is noticed. A look costs a system call per file."""

T = TypeVar("T")
_Stamp = tuple[tuple[int, int, int], ...]


class WatchedFiles(Generic[T]):
    """What files say now. Files that belong together, such as a certificate and its key, are watched together.

    When what they say cannot be used (half written, gone, the key of another certificate) the last that could be used
    stays, and it is said once in the log. The error of the first reading is raised.
    """

    def __init__(
        self,
        paths: tuple[str | Path, ...],
        parse: Callable[[tuple[bytes, ...]], T],
        what: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """parse: from the contents to the value; raises ConfigError, whose message must not quote the contents.

        what: for the log. Raises ConfigError.
        """
        self._paths, self._parse, self._what, self._clock = tuple(map(Path, paths)), parse, what, clock
        self._stamp = self._look()
        self._value = self._read()
        self._looked_at = clock()

    def get(self) -> T:
        """The value, read anew if a file has changed; looks at most once per CHECK_INTERVAL. Does not raise."""
        now = self._clock()
        if now - self._looked_at < CHECK_INTERVAL:
            return self._value
        self._looked_at = now
        stamp = self._look()
        if stamp == self._stamp:
            return self._value
        # Remembered also if it cannot be used: the same mistake is not reported every second.
        self._stamp = stamp
        try:
            self._value = self._read()
        except ConfigError as error:
            logger.error("%s has changed and cannot be used, the old one stays: %s", self._what, error)
        else:
            logger.info("%s has changed and is used now", self._what)
        return self._value

    def _read(self) -> T:
        contents = []
        for path in self._paths:
            try:
                contents.append(path.read_bytes())
            except OSError as error:
                raise ConfigError(f"{self._what} {path}: {error.strerror}") from error
        return self._parse(tuple(contents))

    def _look(self) -> _Stamp:
        """What tells that a file is another: its place on the disk, size and time."""
        stamps = []
        for path in self._paths:
            try:
                found = os.stat(path)
            except OSError:
                stamps.append((0, 0, 0))
            else:
                stamps.append((found.st_ino, found.st_size, found.st_mtime_ns))
        return tuple(stamps)
