"""The gateway of a command under test."""

from __future__ import annotations

import time

from tests.cluster.command import Command

START_TIMEOUT = 120.0
"""Seconds from READY to OPENAI on a busy machine."""


def wait_openai(command: Command) -> str:
    """The base URL of the OPENAI line, which comes after the READY line."""
    deadline = time.monotonic() + START_TIMEOUT
    while True:
        for line in list(command.lines):
            word, _, url = line.partition(" ")
            if word == "OPENAI":
                return url
        assert command.process.poll() is None, "\n".join(command.errors)
        assert time.monotonic() < deadline, "\n".join(command.errors)
        time.sleep(0.02)
