"""A role as a child process: started, waited for until it says READY, watched, ended."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

from grokmoe.errors import StartupError
from grokmoe.settings import child_environment

NUM_LAST_LINES = 20
"""Lines of a child's standard error kept for the report of its death."""

MAX_LINE_BYTES = 1024 * 1024
"""A longer line is passed on in pieces."""

STOP_TIMEOUT = 15.0
"""Seconds a child has to end after SIGTERM before it is killed."""

_ROOT = str(Path(__file__).resolve().parent.parent)


class RoleProcess:
    """One child. `address`, `metrics` and `health`, if it has an address of its own, are known once it is ready, and
    `rank_pids`: the process ids of the ranks that it has started, by rank."""

    def __init__(
        self, role: str, index: int, module: str, flags: Sequence[str], say: Callable[[str], None] | None = None
    ) -> None:
        """module: what `python -m` runs; it prints READY. flags: its command line.

        say: receives what the child writes to standard error, line by line; by default it goes to ours.
        """
        self.role, self.index = role, index
        self._say = say or _to_stderr
        self.address = ""
        self.metrics = ""
        self.health = ""
        self.rank_pids: dict[int, int] = {}
        self._command = (sys.executable, "-m", module, *flags, "--exit-on-stdin-eof")
        self._process: asyncio.subprocess.Process | None = None
        self._last_lines: collections.deque[str] = collections.deque(maxlen=NUM_LAST_LINES)
        self._ready = asyncio.Event()
        self._readers: list[asyncio.Task[None]] = []

    @property
    def name(self) -> str:
        """Such as `expert 2`."""
        return f"{self.role} {self.index}"

    @property
    def pid(self) -> int:
        """Process id; the child has been started."""
        assert self._process is not None, "not started"
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Exit code, negative for a signal; None while it runs."""
        return self._process.returncode if self._process else None

    async def start(self) -> None:
        """Spawns the child. Its standard input stays open as long as this process lives, then it ends itself."""
        # The packages may be a checkout that was never installed; a child must find them where we did.
        path = os.pathsep.join(part for part in (_ROOT, child_environment().get("PYTHONPATH", "")) if part)
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=child_environment(PYTHONPATH=path),
            # Ctrl-C on the terminal goes to the parent, which ends its children in order.
            start_new_session=True,
        )
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._readers = [
            asyncio.create_task(self._read_output(self._process.stdout)),
            asyncio.create_task(self._read_errors(self._process.stderr)),
        ]

    async def wait_ready(self) -> None:
        """Returns when the child is ready. Raises StartupError with the child's own words when it ends before."""
        ready = asyncio.create_task(self._ready.wait())
        ended = asyncio.create_task(self.wait_ended())
        await asyncio.wait((ready, ended), return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        if not self._ready.is_set():
            words = "\n".join(self._last_lines) or "it said nothing"
            raise StartupError(f"{self.name} ended at start with code {self.returncode}:\n{words}")
        ended.cancel()

    async def wait_ended(self) -> int:
        """Exit code, after all the child had to say has been read."""
        assert self._process is not None, "not started"
        code = await self._process.wait()
        await asyncio.gather(*self._readers, return_exceptions=True)
        return code

    async def stop(self) -> None:
        """SIGTERM, and SIGKILL when that does not help in time."""
        if self._process is None or self._process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self._process.wait(), STOP_TIMEOUT)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        await asyncio.gather(*self._readers, return_exceptions=True)

    async def _read_output(self, stream: asyncio.StreamReader) -> None:
        async for line in _lines(stream):
            word, _, rest = line.strip().partition(" ")
            if word == "METRICS":
                self.metrics = rest
            elif word == "HEALTH":
                self.health = rest
            elif word == "RANK":
                rank, _, pid = rest.partition(" ")
                self.rank_pids[int(rank)] = int(pid)
            elif word == "READY":
                self.address = rest
                self._ready.set()

    async def _read_errors(self, stream: asyncio.StreamReader) -> None:
        async for line in _lines(stream):
            self._last_lines.append(line)
            if self._ready.is_set() or self.role == "router":  # who dies before it is ready is quoted by wait_ready
                # An object of --log-format=json says itself whose it is, and must stay one.
                self._say(line if line.startswith("{") else f"[{self.name}] {line}")


async def _lines(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """Lines as they come, however long: a reader that gave up would fill the pipe and block the child."""
    rest = b""
    while data := await stream.read(65536):
        *whole, rest = (rest + data).split(b"\n")
        for line in whole:
            yield line.decode(errors="replace").rstrip()
        if len(rest) > MAX_LINE_BYTES:
            yield rest.decode(errors="replace")
            rest = b""
    if rest:
        yield rest.decode(errors="replace")


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
