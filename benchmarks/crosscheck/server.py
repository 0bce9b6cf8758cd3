"""The server that both tools load, and which cores it and they run on."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

START_TIMEOUT = 300.0
"""Seconds from the start of the server to both of its addresses."""


def shares() -> tuple[set[int], set[int]]:
    """Cores of the server, and of the tools: half and half, so that no tool is measured waiting for the server."""
    cores = sorted(os.sched_getaffinity(0))
    half = max(1, len(cores) // 2)
    return set(cores[:half]), set(cores[half:] or cores)


def on(cores: set[int]) -> Callable[[], None]:
    """For a child, between fork and exec."""
    return lambda: os.sched_setaffinity(0, cores)


@contextlib.contextmanager
def server(cores: set[int]) -> Iterator[tuple[str, str]]:
    """`grokmoe serve --openai` on free ports. Yields its gRPC address and the URL of its OpenAI API."""
    command = [sys.executable, "-m", "launcher", "serve", "--openai", "--port", "0", "--openai-port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, preexec_fn=on(cores))
    assert process.stdout is not None
    try:
        found: dict[str, str] = {}
        deadline = time.monotonic() + START_TIMEOUT
        for line in process.stdout:
            word, _, value = line.strip().partition(" ")
            found[word] = value
            if {"READY", "OPENAI"} <= found.keys() or time.monotonic() > deadline:
                break
        yield found["READY"], found["OPENAI"]
    finally:
        process.terminate()
        process.wait()
