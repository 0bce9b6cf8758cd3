"""The followers on the leader's own host: its children, which end when it does, and without which it ends."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from grokmoe.settings import child_environment

END_TIMEOUT = 5.0
"""Seconds that followers have to end after they were told to; then they are killed."""

_ROOT = str(Path(__file__).resolve().parent.parent.parent)


class RankProcesses:
    """Followers as processes. pids: by rank."""

    def __init__(self, flags: Mapping[int, Sequence[str]], fail: Callable[[str], object]) -> None:
        """Starts them. flags: of `python -m attention_worker`, by rank; they include --exit-on-stdin-eof.

        fail: called when one ends before it should, on a thread of its own.
        """
        self._fail = fail
        self._is_ending = False
        path = os.pathsep.join(part for part in (_ROOT, child_environment().get("PYTHONPATH", "")) if part)
        self._children = {
            rank: subprocess.Popen(
                [sys.executable, "-m", "attention_worker", *own],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,  # ours is read by whoever waits for READY
                env=child_environment(PYTHONPATH=path),
                start_new_session=True,  # a Ctrl-C on the terminal is the leader's to answer
            )
            for rank, own in flags.items()
        }
        for rank, child in self._children.items():
            threading.Thread(target=self._watch, args=(rank, child), name=f"watch-rank-{rank}", daemon=True).start()

    @property
    def pids(self) -> dict[int, int]:
        """Process ids, by rank."""
        return {rank: child.pid for rank, child in self._children.items()}

    def _watch(self, rank: int, child: subprocess.Popen[bytes]) -> None:
        code = child.wait()
        if not self._is_ending:
            self._fail(f"rank {rank}, pid {child.pid}, ended with code {code}")

    def end(self) -> None:
        """Waits for followers that were told to end, and ends those that were not."""
        self._is_ending = True
        for child in self._children.values():
            assert child.stdin is not None
            with contextlib.suppress(OSError):
                child.stdin.close()
        for child in self._children.values():
            try:
                child.wait(END_TIMEOUT)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
