"""Named limits of rebalancing."""

from __future__ import annotations

import dataclasses

from grokmoe.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class RebalanceSettings:
    """Times in seconds."""

    is_automatic: bool = False
    """Plan and move without being asked."""
    interval: float = 60.0
    """Between two automatic plans. A plan costs tenths of a second of the router's processor."""
    threshold: float = 1.2
    """Imbalance below which nothing is done: the busiest worker has a fifth more than the mean. Chance alone makes a
    tenth within a window."""
    horizon: float = 1800.0
    """How long the load is taken to stay as it is: what a move saves later does not count."""
    window: float = 60.0
    """Time constant with which the load of the past fades. Shorter, and one long prompt looks like a trend."""
    sample_interval: float = 1.0
    """Between two looks at the counters: much shorter than the window."""
    min_rows: int = 2000
    """Rows in the window below which nothing is said about balance: with 8 experts, the busiest of so few is within a
    tenth of its share."""
    min_replicas: int = 0
    """Fewest holders of an expert after a rebalance; 0: as many as the one with the fewest has now, so that a
    rebalance never takes away what a cluster could afford to lose."""
    min_improvement: float = 0.02
    """Share of the forecast time that has to be saved: less is within what the forecast knows."""
    patience: int = 3
    """Automatic plans in a row that must find the moves worth it: a load that shifts faster is not run after."""
    cooldown: float = 180.0
    """After moves, before the next automatic ones: the window has to forget the load before them."""
    load_rate: float = 200e6
    """Bytes per second taken for loading until one has been measured: a disk of no great speed."""
    load_slowdown: float = 0.5
    """By how much expert computation takes longer while a worker loads: reading and packing share its memory and
    cores. The cluster waits for its slowest worker, so one that loads slows all."""
    max_step_bytes: int = 4 << 30
    """Most bytes that one step of a plan loads: what the target holds at most beside what it will hold in the end."""

    def __post_init__(self) -> None:
        for name in ("interval", "horizon", "window", "sample_interval", "load_rate", "patience"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"rebalance {name} is {getattr(self, name)}, must be above 0")
        if self.threshold < 1:
            raise ConfigError(f"rebalance threshold is {self.threshold}, must be at least 1: that is even")
