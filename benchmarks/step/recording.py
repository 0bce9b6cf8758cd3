"""What it costs to know where a step's time goes: calls of the clocks per step, times the time of one call."""

from __future__ import annotations

import time
from collections.abc import Callable

from attention_worker.stages import StageClock, no_time
from grokmoe.model_config import ModelConfig
from grokmoe.telemetry import RouterMetrics, new_registry
from router.legs import LEGS, Legs

LAPS_PER_LAYER, OTHER_LAPS = 7, 4
"""Of an attention worker's clock, at most: four norms and three other stages in each layer; embedding, last norm, head,
sample."""

BLOCKS_PER_LAYER, OTHER_BLOCKS = 5, 3
"""Timed by the router: gate, dispatch, experts, combine and one piece of attention in each layer; the last piece, plan
and delivery."""

CALLS, TRIES = 50, 200


def num_laps(config: ModelConfig) -> int:
    """Laps of one step, at most."""
    return LAPS_PER_LAYER * config.num_layers + OTHER_LAPS


def num_blocks(config: ModelConfig) -> int:
    """Blocks of one step that the router times, at most."""
    return BLOCKS_PER_LAYER * config.num_layers + OTHER_BLOCKS


def recording_seconds(config: ModelConfig) -> float:
    """Of one step."""
    clock, legs = StageClock(), Legs()
    clock.begin(no_time())
    metrics = RouterMetrics(new_registry())
    leg_time = {leg: metrics.leg_time.labels(leg) for leg in LEGS}

    def block() -> None:
        with legs.time("gate"):
            pass

    def end() -> None:
        legs.split("worker", no_time())
        for leg in LEGS:
            leg_time[leg].observe(0.001)

    lap = _seconds(lambda: clock.lap("norm"))
    return num_laps(config) * lap + num_blocks(config) * _seconds(block) + _seconds(end)


def _seconds(call: Callable[[], object]) -> float:
    """Of one call, on average over many, in the best of some tries; the call of the caller's function is in it."""
    best = float("inf")
    for _ in range(TRIES):
        begin = time.perf_counter()
        for _ in range(CALLS):
            call()
        best = min(best, time.perf_counter() - begin)
    return best / CALLS
