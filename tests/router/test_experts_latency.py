"""What is learnt of a worker's calls, and the deadlines that follow."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from router.experts import ExpertCounters, ExpertPoolSettings
from router.experts.hedging import hedge_after
from router.experts.latency import MIN_SAMPLES, WINDOW, Latency, Window, call_deadline
from router.experts.member import MIN_QUEUE, QUEUE_MEMORY, ExpertMember
from router.transport.base import ExpertReply
from tests.router.tiny import ExpertDouble, expert_info

SETTINGS = ExpertPoolSettings()


@given(st.lists(st.floats(0, 100), min_size=1, max_size=3 * WINDOW), st.floats(0, 1))
def test_a_window_is_the_last_samples(samples: list[float], share: float) -> None:
    window = Window()
    for sample in samples:
        window.add(sample)
    kept = sorted(samples[-WINDOW:])
    assert len(window) == len(kept)
    value = window.quantile(share)
    assert value in kept
    assert sum(each <= value for each in kept) >= share * len(kept)
    assert share == 0 or sum(each < value for each in kept) < share * len(kept), "the smallest such"


def latency_of(**samples: tuple[int, float]) -> Latency:
    """rows_N=(calls, seconds)"""
    latency = Latency()
    for name, (num_calls, seconds) in samples.items():
        for _ in range(num_calls):
            latency.add(int(name.removeprefix("rows_")), seconds)
    return latency


class TestQuantile:
    def test_prefills_and_decodes_are_apart(self) -> None:
        latency = latency_of(rows_3=(100, 0.001), rows_500=(100, 0.4))
        assert latency.quantile(2, 0.99) == 0.001
        assert latency.quantile(300, 0.99) == 0.4

    def test_a_class_without_calls_is_guessed_high(self) -> None:
        latency = latency_of(rows_4=(50, 0.001), rows_64=(50, 0.01))
        assert latency.quantile(33, 0.5) == pytest.approx(0.001 * 2**3), "eight times the rows of the smaller class"
        assert latency.quantile(512, 0.5) == pytest.approx(0.01 * 2**3)
        assert latency.quantile(1, 0.5) == 0.001

    def test_too_few_calls_are_none(self) -> None:
        assert Latency().quantile(1, 0.5) is None
        assert latency_of(rows_4=(MIN_SAMPLES - 1, 1.0)).quantile(4, 0.5) is None

    def test_few_calls_of_several_classes_are_enough_together(self) -> None:
        latency = latency_of(rows_1=(MIN_SAMPLES // 2, 0.3), rows_8=(MIN_SAMPLES // 2, 0.4))
        assert latency.quantile(8, 0.5) == pytest.approx(0.3 * 8), "the most that any makes of it"


class TestDeadline:
    def test_it_follows_the_latency_between_floor_and_ceiling(self) -> None:
        limits = ExpertPoolSettings(deadline_factor=3.0, deadline_floor=0.2, deadline_ceiling=10.0)
        for seconds, deadline in ((0.001, 0.2), (0.1, 0.3), (1.0, 3.0), (9.0, 10.0)):
            assert call_deadline(latency_of(rows_8=(50, seconds)), 8, 0, limits) == pytest.approx(deadline)

    def test_first_calls_have_the_cold_deadline(self) -> None:
        assert call_deadline(Latency(), 8, 0, SETTINGS) == SETTINGS.deadline_cold

    @given(
        num_calls=st.integers(0, 40),
        seconds=st.floats(0, 1000),
        num_rows=st.integers(1, 10**6),
        num_attempts=st.integers(0, 10**6),
    )
    def test_always_within_its_bounds_and_longer_with_every_attempt(
        self, num_calls: int, seconds: float, num_rows: int, num_attempts: int
    ) -> None:
        latency = latency_of(rows_8=(num_calls, seconds))
        deadline = call_deadline(latency, num_rows, num_attempts, SETTINGS)
        assert SETTINGS.deadline_floor <= deadline <= SETTINGS.deadline_ceiling
        longer = call_deadline(latency, num_rows, num_attempts + 1, SETTINGS)
        assert longer == deadline == SETTINGS.deadline_ceiling or longer > deadline

    def test_one_outlier_in_a_full_window_sets_no_deadline(self) -> None:
        latency = latency_of(rows_8=(WINDOW, 0.1))
        for _ in range(2):
            latency.add(8, 50.0)
        assert call_deadline(latency, 8, 0, SETTINGS) == pytest.approx(SETTINGS.deadline_factor * 0.1)


def test_hedging_needs_samples_and_a_share() -> None:
    latency = latency_of(rows_8=(50, 0.1))
    limits = ExpertPoolSettings(hedge_quantile=0.9, hedge_share=0.05)
    assert hedge_after(latency, 8, ExpertCounters(calls=20), SETTINGS) is None, "off"
    assert hedge_after(latency, 8, ExpertCounters(calls=19), limits) is None
    assert hedge_after(latency, 8, ExpertCounters(calls=20), limits) == 0.1
    assert hedge_after(latency, 8, ExpertCounters(calls=39, hedges=1), limits) is None
    assert hedge_after(Latency(), 8, ExpertCounters(calls=1000), limits) is None


class TestMember:
    def test_the_queue_it_reports_counts_as_load_for_a_while(self) -> None:
        now = 100.0
        member = ExpertMember(0, ExpertDouble([0]), lambda: now)
        assert member.load == 0
        call = member.begin(0, 4, 4)
        rows_ND = torch.zeros(4, 2)
        member.report(4, 4, ExpertReply(rows_ND, queue=0.025, compute=0.01))
        assert member.load == 4 + 2 * 4
        member.end(call, 4)
        now += QUEUE_MEMORY
        assert member.load == 0
        member.report(4, 4, ExpertReply(rows_ND, queue=1.0, compute=0.0))
        member.report(4, 4, ExpertReply(rows_ND, queue=MIN_QUEUE / 2, compute=1e-6))
        assert member.load == 0

    def test_another_process_at_its_address_is_learnt_anew(self) -> None:
        member = ExpertMember(0, ExpertDouble([0]))
        for incarnation, is_known in (("one", False), ("one", True), ("two", False)):
            member.adopt(expert_info([0], incarnation=incarnation))
            assert (member.latency.quantile(4, 0.5) is not None) == is_known
            for _ in range(MIN_SAMPLES):
                member.latency.add(4, 0.1)
