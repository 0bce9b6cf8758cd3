"""The `grokmoe` command, or another program that says READY, as a child process of a test."""

from __future__ import annotations

import contextlib
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

START_TIMEOUT = 120.0
"""Seconds a command has to say READY on a busy machine."""

STOP_TIMEOUT = 60.0


class Command:
    """A running command whose output is read line by line."""

    def __init__(self, *arguments: str, module: str = "launcher") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.address = ""
        self.lines: list[str] = []
        self.errors: list[str] = []
        self._news: queue.Queue[str | None] = queue.Queue()
        self._readers = [
            threading.Thread(target=self._read, args=(self.process.stdout, self.lines, True)),
            threading.Thread(target=self._read, args=(self.process.stderr, self.errors, False)),
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, stream: Iterator[str], into: list[str], is_news: bool) -> None:
        for line in stream:
            into.append(line.rstrip("\n"))
            if is_news:
                self._news.put(line)
        if is_news:
            self._news.put(None)

    def wait_ready(self) -> str:
        """The address of the READY line."""
        while (line := self._news.get(timeout=START_TIMEOUT)) is not None:
            match = re.match(r"READY (\S+)", line)
            if match:
                self.address = match[1]
                return self.address
        raise AssertionError("ended before READY:\n" + "\n".join(self.errors))

    def wait(self) -> int:
        """The exit code."""
        code = self.process.wait(STOP_TIMEOUT)
        for reader in self._readers:
            reader.join(STOP_TIMEOUT)
        return code

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Sends a signal and waits for the end."""
        self.process.send_signal(number)
        return self.wait()


@contextlib.contextmanager
def running(*arguments: str, module: str = "launcher") -> Iterator[Command]:
    """Starts a command; kills it if the test leaves it running. module: what `python -m` runs."""
    command = Command(*arguments, module=module)
    try:
        yield command
    finally:
        if command.process.poll() is None:
            command.process.kill()
        command.wait()
        for stream in (command.process.stdout, command.process.stderr):
            if stream is not None:
                stream.close()
