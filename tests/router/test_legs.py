"""Where a step's time goes: the legs of the router, and the attention worker's stages that it takes in."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from attention_worker import stages
from attention_worker.engine import MoeInput
from attention_worker.stages import StageClock, no_time
from benchmarks.step.recording import num_laps
from grokmoe.step_plan import SequenceChunk, TokenSampling
from router.legs import LEGS, STAGES, Legs
from tests import goldens
from tests.attention_worker.tiny_engine import CONFIG, attention_engine, fill, plan
from tests.topologies import Setup, fused, greedy, split

GREEDY = TokenSampling()

ONLY_SPLIT = {"attention_wire", "wire", "queue"}


def test_the_worker_has_the_stages_that_the_router_knows() -> None:
    assert stages.STAGES == STAGES
    assert len(set(LEGS)) == len(LEGS)


def test_a_split_moves_time_and_makes_none() -> None:
    legs = Legs()
    legs.add("worker", 1.0)
    legs.split("worker", {"norm": 250_000_000, "out": 500_000_000, "a stage of a later version": 1_000_000_000})
    assert legs.seconds["norm"] == pytest.approx(0.25)
    assert legs.seconds["worker"] == pytest.approx(0.25)
    assert sum(legs.seconds.values()) == pytest.approx(1.0)


def test_laps_of_two_steps_do_not_mix() -> None:
    clock, first, second = StageClock(), no_time(), no_time()
    clock.begin(first)
    clock.lap("norm")
    clock.begin(second)
    clock.lap("qkv")
    assert first["norm"] > 0
    assert first["qkv"] == second["norm"] == 0
    assert second["qkv"] > 0


def test_every_stage_of_a_step_is_timed_no_more_often_than_is_reckoned(monkeypatch: pytest.MonkeyPatch) -> None:
    laps: list[str] = []
    lap = StageClock.lap
    monkeypatch.setattr(StageClock, "lap", lambda clock, stage: (laps.append(stage), lap(clock, stage)))
    engine = attention_engine()
    run = engine.begin(plan(engine, SequenceChunk((5, 6, 7), 0, (0,), GREEDY)))
    at = run.advance(None)
    while isinstance(at, MoeInput):
        at = run.advance(fill(at))
    assert set(laps) == set(STAGES)
    assert len(laps) <= num_laps(CONFIG)
    assert all(run.stages_ns[stage] > 0 for stage in STAGES)


@pytest.mark.parametrize("topology", [fused, split])
def test_the_legs_of_steps_are_within_their_time(topology: Callable[[Setup], Any]) -> None:
    """Every leg that the topology has is there; together they are no longer than the time in which they were."""

    async def main() -> tuple[dict[str, float], float]:
        async with topology(Setup(goldens.DIRECTORY)) as engine:
            begin = time.perf_counter()
            await greedy(engine, [5, 6, 7], 4)
            return dict(engine.report.leg_seconds), time.perf_counter() - begin

    legs, seconds = asyncio.run(main())
    assert set(legs) == set(LEGS)
    assert {leg for leg, spent in legs.items() if spent == 0.0} == (ONLY_SPLIT if topology is fused else set())
    assert all(spent >= 0 for spent in legs.values())
    assert sum(legs.values()) <= seconds
