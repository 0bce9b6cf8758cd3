"""One process of the cluster under test, at an address that stays: it can be ended and started again."""

from __future__ import annotations

import collections
import contextlib
import os
import signal
from collections.abc import Sequence

from launcher.process import RoleProcess

NUM_LINES = 200
"""Lines of a node's log that are kept, over all its starts."""


class Node:
    """A slot for a process. `role` is router, attention, expert or proxy."""

    def __init__(
        self,
        role: str,
        index: int,
        module: str,
        flags: Sequence[str],
        address: str,
        namespace: str = "",
        stderr: str = "",
    ) -> None:
        """address: where others find it, a proxy's if there is one before it.

        namespace, stderr: see child.py; empty: ours, and a pipe to us.
        """
        self.role, self.index, self.address = role, index, address
        self._namespace = namespace
        self.lines: collections.deque[str] = collections.deque(maxlen=NUM_LINES)
        self.num_starts = 0
        self.unclean: list[str] = []
        """Of each end after SIGTERM that was not clean: its code and the last lines of the log."""
        self._flags = [f"--namespace={namespace}", f"--stderr={stderr}", module, *flags]
        self._process: RoleProcess | None = None

    @property
    def name(self) -> str:
        """Such as `expert 2`."""
        return f"{self.role} {self.index}"

    @property
    def namespace(self) -> str:
        """The network namespace it runs in; empty: ours."""
        return self._namespace

    @property
    def pid(self) -> int:
        """Of the process that runs."""
        assert self._process is not None, "not started"
        return self._process.pid

    @property
    def rank_pids(self) -> list[int]:
        """Of the ranks that an attention worker has started."""
        assert self._process is not None, "not started"
        return [*self._process.rank_pids.values()]

    @property
    def is_running(self) -> bool:
        """Whether a process has been started and has not ended."""
        return self._process is not None and self._process.returncode is None

    async def spawn(self) -> None:
        """Starts the process and does not wait for it."""
        self._process = RoleProcess(self.role, self.index, "benchmarks.chaos.child", self._flags, self.lines.append)
        self.num_starts += 1
        await self._process.start()

    async def wait_ready(self) -> None:
        """Returns when it can be used. Raises StartupError with its own words when it ends before."""
        assert self._process is not None, "not started"
        await self._process.wait_ready()

    async def start(self) -> None:
        """Starts the process and waits until it can be used."""
        await self.spawn()
        await self.wait_ready()

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to the process, if it still runs."""
        if self.is_running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    async def kill(self) -> None:
        """kill -9, and waits for the end."""
        self.signal(signal.SIGKILL)
        await self.wait_ended()

    async def wait_ended(self) -> int:
        """The exit code."""
        assert self._process is not None, "not started"
        return await self._process.wait_ended()

    async def stop(self) -> None:
        """SIGTERM, later SIGKILL; a process that was stopped in its tracks goes on for it."""
        self.signal(signal.SIGCONT)
        if self._process is not None:
            await self._process.stop()
