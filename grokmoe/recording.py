"""Loops written down instead of run: what a thread calls while a recording is open becomes a `native.Program`.

Whoever records must keep to what a CUDA graph asks for as well: nothing but loops computes, what they read lies where
it will lie when the program runs, and no decision depends on what they would have computed.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import torch


class Recording:
    """Calls of loops, in order.

    calls: the address of each entry and its parameters. kept: the tensors that they read and write. laps: the number of
    calls so far, and the name of what they were for, in the order in which that was said. after: called whenever the
    program has run, with nanoseconds by name.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[int, list[int]]] = []
        self.kept: list[torch.Tensor] = []
        self.laps: list[tuple[int, str]] = []
        self.after: list[Callable[[dict[str, int]], None]] = []

    def lap(self, name: str) -> None:
        """The calls since the last lap were for this."""
        self.laps.append((len(self.calls), name))


class _Open(threading.local):
    recording: Recording | None = None


_open = _Open()


def current() -> Recording | None:
    """The recording that this thread's calls go to; None: they are run."""
    return _open.recording


@contextlib.contextmanager
def recorded() -> Iterator[Recording]:
    """What this thread calls within is written down. Not to be nested."""
    assert _open.recording is None, "a recording is open"
    recording = _open.recording = Recording()
    try:
        yield recording
    finally:
        _open.recording = None
