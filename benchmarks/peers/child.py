"""Other people's programs as child processes: run to their end, or run beside us for a while."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

NUM_LAST_LINES = 15
"""Lines of a child's output kept for the report of its death."""

RUN_TIMEOUT = 1800.0
"""Seconds a child that runs to its end may take: a slow machine needs minutes for the longest of them."""

STOP_TIMEOUT = 15.0
"""Seconds a child has to end after SIGTERM before it is killed."""

RESULT = "RESULT "
"""Begins a line of our own child programs that has a JSON object: metric -> value. Their libraries print others."""


class PeerFailed(Exception):
    """A contender did not do what was asked of it. The race goes on without it."""


Command = Sequence[str | Path]


@contextlib.asynccontextmanager
async def running(command: Command, environment: Mapping[str, str]) -> AsyncIterator[asyncio.subprocess.Process]:
    """A child whose output is read by whoever has it; it has ended, with all its own children, when the block ends."""
    process = await asyncio.create_subprocess_exec(
        *map(str, command),
        env={**os.environ, **environment},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
        limit=1 << 20,
    )
    try:
        yield process
    finally:
        for stop in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, stop)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), STOP_TIMEOUT)


async def output(
    command: Command, environment: Mapping[str, str] | None = None, timeout: float = RUN_TIMEOUT
) -> list[str]:
    """All lines a program prints. Raises PeerFailed with the last ones if it fails, or takes too long."""
    found: list[str] = []
    try:
        async with asyncio.timeout(timeout), running(command, environment or {}) as process:
            assert process.stdout is not None
            async for line in process.stdout:
                found.append(line.decode(errors="replace").rstrip())
            code = await process.wait()
    except TimeoutError:
        raise PeerFailed(f"{Path(command[0]).name} took more than {timeout:.0f} s") from None
    if code:
        raise PeerFailed(f"{Path(command[0]).name} ended with {code}:\n" + "\n".join(found[-NUM_LAST_LINES:]))
    return found


def results(lines: Sequence[str]) -> dict[str, float]:
    """Metric -> value, of one of our own child programs. Raises PeerFailed if it told none."""
    found: dict[str, float] = {}
    for line in lines:
        if line.startswith(RESULT):
            found |= json.loads(line.removeprefix(RESULT))
    if not found:
        raise PeerFailed("it measured nothing:\n" + "\n".join(lines[-NUM_LAST_LINES:]))
    return found


class LastLines:
    """Reads a running child's output, so that it never blocks, and keeps the end of it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._lines: collections.deque[str] = collections.deque(maxlen=NUM_LAST_LINES)
        self._process = process
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            self._lines.append(line.decode(errors="replace").rstrip())

    async def ended(self) -> None:
        """Returns when all has been read."""
        await self._reader

    def check_alive(self) -> None:
        """Raises PeerFailed with the child's last words if it has ended."""
        if self._process.returncode is not None:
            raise PeerFailed(f"ended with {self._process.returncode}:\n" + "\n".join(self._lines))
