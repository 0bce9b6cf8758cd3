"""A command on a terminal of its own, as a person would have it."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import threading
import time
from typing import Self

TIMEOUT = 30.0
"""Seconds that a busy machine gets for what it is waited for."""

CTRL_C, CTRL_D, UP = b"\x03", b"\x04", b"\x1b[A"

_CONTROL = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
"""Makes standard input the terminal that controls the process, so that Ctrl-C becomes a signal."""


class Terminal:
    """Runs `python -m launcher ...` on a pseudo-terminal while its `with` block runs."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self._arguments = arguments
        self._environment = environment
        self._output = b""
        self._news = threading.Condition()
        self._seen = 0

    def __enter__(self) -> Self:
        self._master, slave = pty.openpty()
        command = [sys.executable, "-c", _CONTROL, sys.executable, "-m", "launcher", *self._arguments]
        environment = {**os.environ, "TERM": "dumb", "INPUTRC": "/dev/null", **self._environment}
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True
        )
        os.close(slave)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        return self

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._master, 4096)
            except OSError:  # the last process on the terminal has ended
                data = b""
            with self._news:
                self._output += data
                self._news.notify_all()
            if not data:
                return

    def press(self, keys: str | bytes) -> None:
        """Types. A line ends with a line feed."""
        os.write(self._master, keys.encode() if isinstance(keys, str) else keys)

    def wait_for(self, words: str) -> str:
        """What came since the last wait, to the end of these words."""
        wanted = words.encode()
        deadline = time.monotonic() + TIMEOUT
        with self._news:
            while (found := self._output.find(wanted, self._seen)) < 0:
                left = deadline - time.monotonic()
                assert left > 0, f"waited for {words!r}, got {self._output[self._seen :].decode()!r}"
                self._news.wait(left)
            text = self._output[self._seen : found + len(wanted)]
            self._seen = found + len(wanted)
            return text.decode()

    def interrupt_until(self, words: str) -> None:
        """Presses Ctrl-C until these words come. An interrupt that arrives just before the library begins to wait for a
        key is noticed with the next key only; a person presses it again, too."""
        wanted, deadline = words.encode(), time.monotonic() + TIMEOUT
        with self._news:
            while self._output.find(wanted, self._seen) < 0:
                assert time.monotonic() < deadline, f"waited for {words!r}"
                self.press(CTRL_C)
                self._news.wait_for(lambda: self._output.find(wanted, self._seen) >= 0, 1.0)
            self._seen = len(self._output)

    def wait_ended(self) -> int:
        """The exit code."""
        return self.process.wait(TIMEOUT)

    def __exit__(self, *exception: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()
        os.close(self._master)
