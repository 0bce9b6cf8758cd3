"""Times as multiples of a product of matrices that is timed in turns with what is measured: what slows the one slows
the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from grokmoe.packed_linear import PackedLinear

ROWS, WIDTH = 64, 1024
"""Of the product: about a hundred microseconds, as long as what is measured."""


class Yardstick:
    """The product, in bfloat16."""

    def __init__(self) -> None:
        self._linear = PackedLinear(torch.randn(WIDTH, WIDTH).bfloat16())
        self._x_NI = torch.randn(ROWS, WIDTH).bfloat16()

    def __call__(self) -> None:
        """Once."""
        self._linear(self._x_NI)


def ratios(paths: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """By name: the shortest time of the path over the shortest of the yardstick. The shortest, since whatever else the
    machine does only adds."""
    yardstick = Yardstick()
    best = dict.fromkeys([*paths, ""], float("inf"))
    for _ in range(rounds):
        for name, run in {**paths, "": yardstick}.items():
            run()  # warm: the one before has filled the caches
            begin = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - begin)
    return {name: best[name] / best[""] for name in paths}
