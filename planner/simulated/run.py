"""A scenario, from the first request to the last token."""

from __future__ import annotations

import time

from planner.arrivals import draw
from planner.simulated.outcome import outcome_of
from planner.simulated.results import Outcome
from planner.simulated.scenario import Scenario
from planner.simulated.world import World

MOST_AFTER = 600.0
"""Seconds of the simulation in which requests may end that came within it; what has not ended by then never does."""


def simulate(scenario: Scenario) -> Outcome:
    """Raises InvalidRequest for a request that never fits."""
    began = time.perf_counter()
    world = World(scenario)
    most = min(world.scheduler_settings.context_length, world.num_pages * world.page_size)
    num = max(1, round(scenario.load.rate * scenario.seconds))
    arrivals = draw(scenario.load, num, scenario.seed, most)
    for number, arrival in enumerate(arrivals):
        world.clock.at(arrival.time, lambda number=number, arrival=arrival: world.arrive(number, arrival))  # type: ignore[misc]
    for failure in scenario.failures:
        world.clock.at(failure.at, lambda failure=failure: world.lose(failure))  # type: ignore[misc]
    last = arrivals[-1].time
    world.clock.run(last + MOST_AFTER, lambda: world.clock.now > last and not world.num_open)
    return outcome_of(world, time.perf_counter() - began)
