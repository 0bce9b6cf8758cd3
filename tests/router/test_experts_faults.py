"""Calls that are lost, late, slow or answered with nonsense: the rows come back with the same bits all the same."""

from __future__ import annotations

import asyncio
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grokmoe.errors import DeadlineExceeded, InternalError
from router.experts import Cause, ExpertPool, ExpertPoolSettings, ExpertsUnavailable
from router.experts.answers import is_finite
from router.experts.latency import MIN_SAMPLES
from router.legs import Legs
from router.moe import RemoteMoe, RowCounter
from router.transport.base import ExpertReply
from router.worker_state import WorkerState
from tests.router import tiny
from tests.router.faulty_experts import Fault, FaultyExpert
from tests.router.test_experts import call, expected, pool_of
from tests.router.tiny import CONFIG, ExpertDouble, gates, until

EAGER = ExpertPoolSettings(
    replica_wait=20.0, probe_interval=0.005, probe_interval_max=0.02, deadline_floor=0.05, deadline_cold=0.05
)

STILL = ExpertPoolSettings(probe_interval=60.0, probe_interval_max=60.0, deadline_floor=0.5, deadline_cold=0.5)
"""Who is lost stays so for the test; deadlines are such that only who hangs misses one."""


def idle(pool: ExpertPool) -> bool:
    return all(member.rows_in_flight == member.calls_in_flight == 0 for member in pool.members)


class TestDeadlines:
    def test_a_worker_that_hangs_is_found_and_its_rows_go_to_the_replica(self) -> None:
        async def main() -> None:
            hung, replica = FaultyExpert(lambda _: Fault.HANG), ExpertDouble()
            async with pool_of([hung, replica], STILL) as pool:
                begin = time.monotonic()
                assert torch.equal(await call(pool), expected())
                assert time.monotonic() - begin < 5, "not the ceiling"
                assert pool.members[0].state is WorkerState.SUSPECT
                assert hung.num_given_up == 1
                assert hung.resets == [0], "what it owes is abandoned"
                assert pool.counters.deadline_misses == pool.counters.failovers == 1
                assert idle(pool)
                assert torch.equal(await call(pool), expected())
                assert len(hung.calls) == 1

        asyncio.run(main())

    def test_warm_workers_are_found_out_by_what_they_have_shown(self) -> None:
        """The cold deadline is a minute; the calls observed so far make it the floor."""

        async def main() -> None:
            patient = ExpertPoolSettings(deadline_cold=60.0, deadline_floor=0.1, deadline_factor=8.0)
            hung, replica = FaultyExpert(lambda number: Fault.HANG if number >= MIN_SAMPLES else None), ExpertDouble()
            async with pool_of([hung, replica], patient) as pool:
                while len(hung.calls) < MIN_SAMPLES:
                    await call(pool)
                begin = time.monotonic()
                assert torch.equal(await call(pool), expected())
                assert time.monotonic() - begin < 10
                assert pool.counters.deadline_misses == 1

        asyncio.run(main())

    def test_without_a_replica_a_slow_worker_is_waited_for(self) -> None:
        async def main() -> None:
            only = FaultyExpert({0: Fault.SLOW, 1: Fault.SLOW})
            hasty = ExpertPoolSettings(deadline_floor=0.001, deadline_cold=0.001)
            async with pool_of([only], hasty) as pool:
                assert torch.equal(await call(pool), expected())
                assert len(only.calls) == 1
                assert pool.members[0].is_usable

        asyncio.run(main())

    def test_without_a_replica_the_ceiling_holds(self) -> None:
        async def main() -> None:
            ceiling = ExpertPoolSettings(probe_interval=0.005, deadline_cold=0.01, deadline_ceiling=0.3)
            only = FaultyExpert({0: Fault.HANG})
            async with pool_of([only], ceiling) as pool:
                begin = time.monotonic()
                assert torch.equal(await call(pool), expected()), "it is asked again when it answers probes"
                assert time.monotonic() - begin >= 0.3
                assert pool.counters.deadline_misses >= 1

        asyncio.run(main())

    def test_an_overdue_call_moves_when_a_replica_appears(self) -> None:
        async def main() -> None:
            hung = FaultyExpert(lambda _: Fault.HANG)
            async with pool_of([hung], EAGER) as pool:
                waiting = asyncio.create_task(call(pool))
                await until(lambda: len(pool._attempts._overdue) == 1)
                pool.add(ExpertDouble())
                assert torch.equal(await waiting, expected())
                assert pool._attempts._overdue == set()
                await until(lambda: idle(pool))

        asyncio.run(main())

    def test_rows_that_are_slow_everywhere_are_not_passed_round_for_ever(self) -> None:
        """Both workers take fifty times the deadline; it doubles with every attempt."""

        async def main() -> None:
            hasty = ExpertPoolSettings(
                probe_interval=0.001, probe_interval_max=0.002, deadline_cold=0.001, deadline_floor=0.001
            )
            links = [FaultyExpert(lambda _: Fault.SLOW), FaultyExpert(lambda _: Fault.SLOW)]
            async with pool_of(links, hasty) as pool:
                assert torch.equal(await call(pool), expected())
                assert 1 <= pool.counters.deadline_misses <= 24

        asyncio.run(main())

    def test_the_end_of_the_step_is_no_fault_of_the_worker(self) -> None:
        async def main() -> None:
            only = FaultyExpert({0: Fault.HANG})
            async with pool_of([only]) as pool:
                moe = remote_moe(pool, time.monotonic() + 0.05)
                with pytest.raises(ExpertsUnavailable, match="in the time that the step has"):
                    await moe.fill(0, INPUTS[0])
                assert pool.members[0].is_usable
                assert only.timeouts[0] is not None
                assert only.timeouts[0] <= 0.05, "the worker knows it, too"
                await until(lambda: idle(pool))

        asyncio.run(main())

    def test_a_worker_that_had_no_time_to_begin(self) -> None:
        class Busy(ExpertDouble):
            async def forward(self, *arguments: object) -> ExpertReply:
                raise DeadlineExceeded("queued for too long")

        async def main() -> None:
            async with pool_of([Busy(), ExpertDouble()], STILL) as pool:
                assert torch.equal(await call(pool), expected())
                assert pool.counters.retries == {Cause.DEADLINE: 1}

        asyncio.run(main())


class TestHedging:
    HEDGED = ExpertPoolSettings(hedge_quantile=0.9, hedge_share=0.25, deadline_cold=60.0, deadline_floor=60.0)

    async def warm(self, pool: ExpertPool) -> None:
        while not all(len(member.link.calls) >= MIN_SAMPLES for member in pool.members):  # type: ignore[attr-defined]
            await call(pool)
        # On a busy machine calls may have been hedged by now: the next one must be free to be.
        while pool.counters.hedges + 1 > self.HEDGED.hedge_share * pool.counters.calls:
            await call(pool)

    def test_the_first_answer_wins(self) -> None:
        async def main() -> None:
            is_hung = False
            hung, replica = FaultyExpert(lambda _: Fault.HANG if is_hung else None), FaultyExpert()
            async with pool_of([hung, replica], self.HEDGED) as pool:
                await self.warm(pool)
                won, is_hung = pool.counters.hedges_won, True
                num_calls = len(hung.calls)
                while len(hung.calls) == num_calls:
                    assert torch.equal(await call(pool), expected())
                assert pool.counters.hedges_won == won + 1
                assert pool.members[0].is_usable, "slow, not lost"
                await until(lambda: idle(pool))
                assert hung.num_given_up == 1
                assert hung.resets == [], "its other calls go on"

        asyncio.run(main())

    def test_a_bounded_share_of_calls_is_hedged(self) -> None:
        async def main() -> None:
            is_slow = False
            links = [FaultyExpert(lambda _: Fault.SLOW if is_slow else None) for _ in range(2)]
            async with pool_of(links, self.HEDGED) as pool:
                await self.warm(pool)
                is_slow = True
                for _ in range(12):
                    assert torch.equal(await call(pool), expected())
                counters = pool.counters
                assert 1 <= counters.hedges <= 0.25 * counters.calls
                assert counters.hedges == counters.hedges_won + counters.hedges_lost
                await until(lambda: idle(pool))

        asyncio.run(main())

    def test_a_hedged_call_survives_the_loss_of_either_worker(self) -> None:
        async def main() -> None:
            faults: dict[int, Fault] = {}
            links = [FaultyExpert(lambda number: faults.get(number // 10**6)) for _ in range(2)]
            async with pool_of(links, self.HEDGED) as pool:
                await self.warm(pool)
                first, second = links
                first._fault_of = lambda _: Fault.HANG
                second._fault_of = lambda _: Fault.DIE
                waiting = asyncio.create_task(call(pool))
                await until(lambda: pool.members[1].state is WorkerState.SUSPECT)
                second._fault_of = lambda _: None
                pool.members[0].state = WorkerState.READY
                first._fault_of = lambda _: None
                await until(lambda: pool.members[1].is_usable)
                assert not waiting.done(), "the first worker still has it"
                waiting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await waiting
                await until(lambda: idle(pool))
                assert torch.equal(await call(pool), expected())

        asyncio.run(main())

    def test_it_is_off_by_default(self) -> None:
        async def main() -> None:
            links = [FaultyExpert(), FaultyExpert()]
            async with pool_of(links, ExpertPoolSettings()) as pool:
                await self.warm(pool)
                assert pool.counters.hedges == 0

        asyncio.run(main())


class TestCorruptAnswers:
    @pytest.mark.parametrize("fault", [Fault.NAN, Fault.SHAPE, Fault.DTYPE])
    def test_rows_are_sent_to_the_replica(self, fault: Fault, caplog: pytest.LogCaptureFixture) -> None:
        async def main() -> None:
            async with pool_of([FaultyExpert({0: fault}), ExpertDouble()], STILL) as pool:
                assert torch.equal(await call(pool), expected())
                assert pool.counters.corrupt == 1
                assert pool.counters.retries == {Cause.CORRUPT: 1}
                assert pool.members[0].state is WorkerState.SUSPECT
                assert "expert worker 0" in caplog.text

        asyncio.run(main())

    def test_rows_on_which_two_workers_agree_have_no_answer(self) -> None:
        async def main() -> None:
            links = [FaultyExpert(lambda _: Fault.NAN) for _ in range(3)]
            async with pool_of(links, EAGER) as pool:
                with pytest.raises(InternalError, match=r"agree on an answer .* rows hold NaN or infinity"):
                    await call(pool)
                await until(lambda: idle(pool))

        asyncio.run(main())

    def test_rows_that_were_none_when_they_were_sent_are_no_fault_of_the_worker(self) -> None:
        async def main() -> None:
            async with pool_of([ExpertDouble()]) as pool:
                x_TD = INPUTS[0].clone()
                x_TD[3, 5] = torch.nan
                out_TD = await remote_moe(pool).fill(0, x_TD)
                assert torch.isnan(out_TD[3]).all()
                assert torch.isfinite(out_TD[:3]).all()
                assert pool.counters.corrupt == 0

        asyncio.run(main())

    def test_the_search_for_them_can_be_left_out(self) -> None:
        async def main() -> None:
            async with pool_of([FaultyExpert({0: Fault.NAN})], ExpertPoolSettings(check_finite=False)) as pool:
                assert torch.isnan(await call(pool)).any()

        asyncio.run(main())

    @given(
        st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=1, max_size=20),
        st.sampled_from([torch.float32, torch.bfloat16]),
    )
    def test_finite_is_what_every_element_is(self, values: list[float], dtype: torch.dtype) -> None:
        rows_ND = torch.tensor([values]).to(dtype)
        assert is_finite(rows_ND) == bool(torch.isfinite(rows_ND).all()), "a sum that overflows is no NaN"


INPUTS = [torch.randn(7, CONFIG.hidden_size, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


def remote_moe(pool: ExpertPool, deadline: float | None = None) -> RemoteMoe:
    return RemoteMoe(CONFIG, gates(), pool, RowCounter(CONFIG), tiny.device(), 0, Legs(), deadline)


async def fill_all(pool: ExpertPool) -> list[torch.Tensor]:
    """Two steps at the same time, each through all layers and back to back."""

    async def steps(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        moe = remote_moe(pool)
        return [await moe.fill(layer, x_TD) for x_TD in inputs for layer in range(CONFIG.num_layers)]

    first, second = await asyncio.gather(steps(INPUTS[:2]), steps(INPUTS[2:]))
    return [*first, *second]


async def undisturbed() -> list[torch.Tensor]:
    async with pool_of([ExpertDouble()]) as pool:
        return await fill_all(pool)


PASSING = [Fault.DIE, Fault.HANG, Fault.SLOW, Fault.DRAIN]
"""Faults after which the same rows may be sent for ever; the others are taken for the rows' own at some point."""

SCHEDULES = st.lists(st.dictionaries(st.integers(0, 11), st.sampled_from(PASSING), max_size=5), min_size=2, max_size=3)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    schedules=SCHEDULES,
    single=st.tuples(st.integers(0, 1), st.integers(0, 11), st.sampled_from([*Fault])),
    hedge_quantile=st.sampled_from([0.0, 0.5]),
)
def test_whatever_happens_the_output_is_the_same(
    schedules: list[dict[int, Fault]], single: tuple[int, int, Fault], hedge_quantile: float
) -> None:
    async def main() -> None:
        want = await undisturbed()
        worker, number, fault = single
        faults = [dict(schedule) for schedule in schedules]
        faults[worker][number] = fault
        links = [FaultyExpert(schedule) for schedule in faults]
        limits = ExpertPoolSettings(
            replica_wait=20.0,
            probe_interval=0.001,
            probe_interval_max=0.005,
            deadline_floor=0.02,
            deadline_cold=0.02,
            deadline_ceiling=0.5,
            hedge_quantile=hedge_quantile,
            hedge_share=0.5,
        )
        async with pool_of(links, limits) as pool:
            async with asyncio.timeout(tiny.TIMEOUT):
                got = await fill_all(pool)
            assert len(got) == len(want)
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, want, strict=True)), "bit for bit"
            await until(lambda: idle(pool))
            assert pool._attempts._overdue == set()
            await until(lambda: all(member.is_usable for member in pool.members))

    asyncio.run(main())
