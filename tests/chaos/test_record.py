"""A table that is made in several runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.chaos.campaign import Campaign, Effect, Span
from benchmarks.chaos.load import Outcome
from benchmarks.chaos.record import Record

EFFECT = Effect("kill", "expert", 0.1, 0.2, None, 5, 1, 0, ("Unavailable: gone",))


@given(
    st.lists(
        st.builds(
            Effect,
            st.sampled_from(["kill", "hang"]),
            st.just("expert"),
            st.floats(0, 10),
            st.floats(0, 10),
            st.none() | st.floats(0, 10),
            st.integers(0, 9),
            st.integers(0, 9),
            st.integers(0, 9),
            st.lists(st.text()).map(tuple),
        )
    )
)
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, effects: list[Effect]) -> None:
    path = tmp_path_factory.mktemp("record") / "effects.jsonl"
    for effect in effects:
        Record(path).add([effect])
    assert Record(path).effects == effects
    assert Record(path).counts().total() == len(effects)


def test_lines_are_whole_objects(tmp_path: Path) -> None:
    path = tmp_path / "effects.jsonl"
    Record(path).add([EFFECT, dataclasses.replace(EFFECT, kind="hang")])
    assert [json.loads(line)["kind"] for line in path.read_text().splitlines()] == ["kill", "hang"]


def test_without_a_file_it_is_this_run() -> None:
    record = Record(None)
    record.add([EFFECT])
    assert record.effects == [EFFECT]


def campaign_of(outcomes: list[Outcome], *begins: float) -> Campaign:
    run = Campaign(cast(Any, None), cast(Any, None), cast(Any, SimpleNamespace(outcomes=outcomes)), cast(Any, None))
    run.spans += [Span("kill", "expert", begin, begin + 1.0, 0.1) for begin in begins]
    return run


class TestSettled:
    def test_the_last_one_waits_for_the_next(self) -> None:
        run = campaign_of([], 10.0)
        assert run.settled() == []
        run.spans.append(Span("hang", "expert", 20.0, 21.0, 0.1))
        assert [effect.kind for effect in run.settled()] == ["kill"]
        assert run.settled() == []
        assert [effect.kind for effect in run.settled(is_over=True)] == ["hang"]

    def test_a_stream_that_is_alive_keeps_it_open(self) -> None:
        outcome = Outcome(10.5, [10.6])
        run = campaign_of([outcome], 10.0, 20.0)
        assert run.settled() == []
        outcome.arrivals.append(15.0)
        outcome.end = 16.0
        (effect,) = run.settled()
        assert effect.stall == pytest.approx(4.4)

    def test_one_that_began_later_does_not(self) -> None:
        assert len(campaign_of([Outcome(25.0)], 10.0, 20.0).settled()) == 1
