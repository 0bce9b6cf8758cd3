"""Where the time of a step goes, leg by leg."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

LEGS = ("attention", "gate", "dispatch", "wire", "queue", "expert", "combine")
"""attention: the attention worker computes. gate: choosing experts. dispatch: sorting and gathering rows. wire: a
call of expert workers less their own time, and a message of an attention worker less its own. queue: rows wait for
the expert worker's device. expert: grouped GEMM of the slowest worker of the layer. combine: weighting and adding."""


class Legs:
    """Sums of seconds, by leg, for one step."""

    __slots__ = ("seconds",)

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(LEGS, 0.0)

    def add(self, leg: str, seconds: float) -> None:
        """Adds to one leg."""
        self.seconds[leg] += seconds

    @contextmanager
    def time(self, leg: str) -> Iterator[None]:
        """Adds the time of a block to one leg."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[leg] += time.perf_counter() - begin
