"""Where the time of a step goes, leg by leg. The legs do not overlap: together they are the step, but for what nobody
timed."""

from __future__ import annotations

import time
from collections.abc import Mapping

STAGES = ("embed", "norm", "qkv", "attention", "out", "head", "sample")
"""What an attention worker computes and times itself, see attention_worker/stages.py."""

LEGS = (
    "schedule", "plan", *STAGES, "worker", "attention_wire", "gate", "dispatch", "wire", "queue", "expert", "combine",
    "deliver",
)  # fmt: skip
"""schedule: choosing the sequences and their pages. plan: the plan, written down for the attention worker. worker: the
attention worker beside its stages: it reads messages, builds the batch, hands over to its device and waits for it.
attention_wire: messages of the attention worker, less its own time. gate: choosing experts. dispatch: sorting and
gathering rows. wire: calls of expert workers less their own time. queue: rows wait for the expert worker's device.
expert: grouped GEMM of the slowest worker of the layer. combine: weighting and adding. deliver: tokens to the
sequences and to those who wait for them."""


class Legs:
    """Sums of seconds, by leg, for one step."""

    __slots__ = ("seconds",)

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(LEGS, 0.0)

    def add(self, leg: str, seconds: float) -> None:
        """Adds to one leg."""
        self.seconds[leg] += seconds

    def split(self, leg: str, parts_ns: Mapping[str, int]) -> None:
        """Some of a leg's time turns out to be that of others: nanoseconds by leg. Names that are none are left."""
        for part, spent_ns in parts_ns.items():
            if part in self.seconds:
                self.seconds[part] += spent_ns / 1e9
                self.seconds[leg] -= spent_ns / 1e9

    def time(self, leg: str) -> _Block:
        """Adds the time of a `with` block to one leg."""
        return _Block(self, leg)


class _Block:
    """What `contextlib.contextmanager` would make, three times as fast: several are entered in every layer."""

    __slots__ = ("_begin", "_leg", "_legs")

    def __init__(self, legs: Legs, leg: str) -> None:
        self._legs, self._leg = legs, leg

    def __enter__(self) -> None:
        self._begin = time.perf_counter()

    def __exit__(self, *raised: object) -> None:
        self._legs.add(self._leg, time.perf_counter() - self._begin)
