"""States of a worker, and the way back into use."""

from __future__ import annotations

import asyncio
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grokmoe.errors import ConfigError, Unavailable
from router.probing import Prober, ProbeSettings
from router.worker_state import WorkerEvent, WorkerState, after
from tests.router.tiny import until

DRAWN = {
    (WorkerState.READY, WorkerEvent.FAILED): WorkerState.SUSPECT,
    (WorkerState.DRAINING, WorkerEvent.FAILED): WorkerState.SUSPECT,
    (WorkerState.SUSPECT, WorkerEvent.AWAY): WorkerState.DEAD,
    (WorkerState.DRAINING, WorkerEvent.AWAY): WorkerState.DEAD,
}


class TestStates:
    @pytest.mark.parametrize("state", list(WorkerState))
    def test_transitions_are_those_of_the_drawing(self, state: WorkerState) -> None:
        assert after(state, WorkerEvent.ANSWERED) is WorkerState.READY
        assert after(state, WorkerEvent.DRAINS) is WorkerState.DRAINING
        for event in (WorkerEvent.FAILED, WorkerEvent.AWAY):
            assert after(state, event) is DRAWN.get((state, event), state)

    @given(st.lists(st.sampled_from(WorkerEvent)))
    def test_ready_only_by_its_own_answer(self, events: list[WorkerEvent]) -> None:
        state = WorkerState.JOINING
        for event in events:
            before, state = state, after(state, event)
            if state is WorkerState.READY and before is not WorkerState.READY:
                assert event is WorkerEvent.ANSWERED
        if events and events[-1] is WorkerEvent.FAILED:
            assert state is not WorkerState.READY


@given(st.floats(0.001, 10), st.floats(0.001, 100), st.integers(0, 10_000))
def test_the_pause_doubles_up_to_its_cap(first: float, cap: float, number: int) -> None:
    settings = ProbeSettings(first_pause=first, max_pause=cap)
    assert settings.pause(0) == min(first, cap)
    assert settings.pause(number + 1) == min(2 * settings.pause(number), cap)


class Worker:
    """answers: what becomes of each attempt; then it is there."""

    def __init__(self, *answers: Exception) -> None:
        self.answers = list(answers)
        self.num_attempts = 0
        self.events: list[str] = []
        self.now = 0.0

    async def connect(self) -> None:
        self.num_attempts += 1
        self.now += 1.0
        if self.answers:
            raise self.answers.pop(0)

    def prober(self, settings: ProbeSettings = ProbeSettings(0.001, 0.002, dead_after=3.0)) -> Prober:  # noqa: B008
        return Prober(
            self.connect,
            settings,
            lambda: self.events.append("back"),
            "worker 7",
            lambda: self.events.append("dead"),
            clock=lambda: self.now,
        )


class TestProber:
    def test_it_asks_until_the_worker_answers(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO)

        async def main() -> None:
            worker = Worker(Unavailable("away"), TimeoutError(), ConfigError("other model"), ConfigError("other model"))
            prober = worker.prober()
            prober.start()
            prober.start()
            assert prober.is_running
            await until(lambda: not prober.is_running)
            assert worker.num_attempts == 5
            assert worker.events == ["dead", "back"]
            texts = [record.getMessage() for record in caplog.records if record.name == "router.probing"]
            assert [text for text in texts if "other model" in text] == ["worker 7 cannot be used: other model"]
            assert texts[-1] == "worker 7 is back after 5.0 s"
            prober.start()
            await until(lambda: worker.events == ["dead", "back", "back"])

        asyncio.run(main())

    def test_a_bug_in_an_attempt_does_not_end_it(self, caplog: pytest.LogCaptureFixture) -> None:
        async def main() -> None:
            worker = Worker(ValueError("a bug"))
            worker.prober().start()
            await until(lambda: worker.events == ["back"])
            assert "a bug" in caplog.text

        asyncio.run(main())

    def test_it_can_be_stopped(self) -> None:
        async def main() -> None:
            worker = Worker(*[Unavailable("away")] * 1000)
            prober = worker.prober()
            prober.stop()
            prober.start()
            await until(lambda: worker.num_attempts > 2)
            prober.stop()
            num_attempts = worker.num_attempts
            await asyncio.sleep(0.01)
            assert (worker.num_attempts, prober.is_running) == (num_attempts, False)

        asyncio.run(main())

    def test_a_worker_that_answers_probes_and_fails_calls_is_asked_ever_less(self) -> None:
        async def main() -> None:
            worker = Worker()
            prober = worker.prober(ProbeSettings(0.001, 0.004, stable_after=10.0))
            for number in range(1, 5):
                prober.start()
                await until(lambda number=number: len(worker.events) == number)  # type: ignore[misc]
            assert prober._num_attempts == 4
            worker.now += 10.0
            prober.start()
            assert prober._num_attempts == 0, "it was in use for long enough"
            prober.stop()

        asyncio.run(main())
