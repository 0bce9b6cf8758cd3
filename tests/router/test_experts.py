"""The pool of expert workers: what becomes of a call when its worker is lost, slow, back, or another than it was."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
import time
from collections.abc import AsyncIterator, Sequence

import pytest
import torch

from grokmoe.errors import ConfigError, InternalError, InvalidRequest, Unavailable
from router import dispatch
from router.discovery import Changes
from router.experts import Cause, ExpertPool, ExpertPoolSettings, ExpertsUnavailable
from router.legs import Legs
from router.placement import NOBODY
from router.transport.base import ExpertLink
from router.worker_state import WorkerState
from tests.router import tiny
from tests.router.faulty_experts import Fault, FaultyExpert
from tests.router.tiny import CONFIG, DTYPE, ExpertDouble, expert_info, until

QUICK = ExpertPoolSettings(replica_wait=0.1, probe_interval=0.005, probe_interval_max=0.02)
PATIENT = ExpertPoolSettings(replica_wait=30.0, probe_interval=0.005, probe_interval_max=0.02)

X_TD = torch.randn(9, CONFIG.hidden_size, generator=torch.Generator().manual_seed(3))
IDS_TK = torch.stack([torch.randperm(8, generator=torch.Generator().manual_seed(token))[:2] for token in range(9)])
WEIGHTS_TK = torch.rand(9, 2, generator=torch.Generator().manual_seed(4))


@contextlib.asynccontextmanager
async def pool_of(
    links: Sequence[ExpertLink], settings: ExpertPoolSettings = QUICK, is_connected: bool = True
) -> AsyncIterator[ExpertPool]:
    pool = ExpertPool(CONFIG, DTYPE, links, None, settings)
    try:
        if is_connected:
            for member in pool.members:
                await pool.connect(member)
            pool.place()
        yield pool
    finally:
        await pool.close()


async def call(pool: ExpertPool, layer: int = 1, legs: Legs | None = None) -> torch.Tensor:
    """One MoE call. Returns rows in the order of tokens and ranks, whoever computed them."""
    plan = dispatch.plan(IDS_TK, WEIGHTS_TK, pool.choose(layer))
    rows_ND = await pool.forward(0, layer, plan.shards, dispatch.gather(plan, X_TD), legs or Legs())
    return rows_ND[plan.row_of_rank_TK.reshape(-1)]


def expected(layer: int = 1) -> torch.Tensor:
    plan = dispatch.plan(IDS_TK, WEIGHTS_TK, dict.fromkeys(range(8), 0))
    (shard,) = plan.shards
    rows_ND = tiny.experts(layer, shard.expert_ids, shard.counts, dispatch.gather(plan, X_TD))
    return rows_ND[plan.row_of_rank_TK.reshape(-1)]


@pytest.mark.parametrize("held", [[range(8)], [range(4), range(4, 8)], [range(8), range(8), range(8)]])
def test_rows_come_back_in_their_order(held: list[range]) -> None:
    async def main() -> None:
        async with pool_of([ExpertDouble(experts) for experts in held]) as pool:
            legs = Legs()
            assert torch.equal(await call(pool, legs=legs), expected())
            assert legs.seconds["expert"] > 0
            assert all(member.rows_in_flight == 0 for member in pool.members)

    asyncio.run(main())


def test_no_rows_need_no_worker() -> None:
    async def main() -> None:
        async with pool_of([ExpertDouble()]) as pool:
            rows_ND = torch.empty(0, CONFIG.hidden_size)
            assert (await pool.forward(0, 0, (), rows_ND, Legs())).shape == rows_ND.shape

    asyncio.run(main())


def test_a_lost_worker_s_rows_go_to_the_replica() -> None:
    async def main() -> None:
        lost, replica = ExpertDouble(), ExpertDouble()
        async with pool_of([lost, replica]) as pool:
            lost.is_up = False
            assert torch.equal(await call(pool), expected()), "bit for bit"
            assert pool.members[0].state is WorkerState.SUSPECT
            num_calls = len(lost.calls)
            assert num_calls == 1
            assert torch.equal(await call(pool), expected())
            assert len(lost.calls) == num_calls, "a suspect worker gets no work"
            lost.is_up = True
            await until(lambda: pool.members[0].state is WorkerState.READY)
            await call(pool)
            assert len(lost.calls) == num_calls + 1, "a probe has brought it back"

    asyncio.run(main())


def broken(*_: object) -> torch.Tensor:
    raise InternalError("out of memory")


def test_a_worker_that_fails_of_itself_is_no_loss_while_there_is_another() -> None:
    async def main() -> None:
        async with pool_of([ExpertDouble(forward=broken), ExpertDouble()]) as pool:
            assert torch.equal(await call(pool), expected())

    asyncio.run(main())


def test_rows_on_which_every_worker_fails_are_given_up() -> None:
    async def main() -> None:
        async with pool_of([ExpertDouble(forward=broken), ExpertDouble(forward=broken)]) as pool:
            with pytest.raises(InternalError, match="out of memory"):
                await call(pool)

    asyncio.run(main())


def test_a_shard_is_cut_up_when_its_experts_are_on_different_workers() -> None:
    async def main() -> None:
        lost, low, high = ExpertDouble(), ExpertDouble(range(4)), ExpertDouble(range(4, 8))
        async with pool_of([lost, low, high]) as pool:
            lost.is_up = False
            plan = dispatch.plan(IDS_TK, WEIGHTS_TK, dict.fromkeys(range(8), 0))
            rows_ND = await pool.forward(0, 1, plan.shards, dispatch.gather(plan, X_TD), Legs())
            assert torch.equal(rows_ND[plan.row_of_rank_TK.reshape(-1)], expected())
            assert low.calls[0][1] == (0, 1, 2, 3)
            assert high.calls[0][1] == (4, 5, 6, 7)

    asyncio.run(main())


def test_a_worker_lost_after_it_was_chosen_gets_no_call() -> None:
    async def main() -> None:
        lost, replica = ExpertDouble(), ExpertDouble()
        async with pool_of([lost, replica]) as pool:
            plan = dispatch.plan(IDS_TK, WEIGHTS_TK, dict.fromkeys(range(8), 0))
            pool.members[0].state = WorkerState.SUSPECT
            await pool.forward(0, 1, plan.shards, dispatch.gather(plan, X_TD), Legs())
            assert lost.calls == []

    asyncio.run(main())


def test_a_call_waits_for_a_worker_to_come_back() -> None:
    async def main() -> None:
        only = ExpertDouble()
        async with pool_of([only], PATIENT) as pool:
            only.is_up = False
            calls = [asyncio.create_task(call(pool)) for _ in range(3)]
            await until(lambda: pool.members[0].state is WorkerState.SUSPECT)
            late = asyncio.create_task(call(pool, layer=2))
            await asyncio.sleep(0)
            assert not any(task.done() for task in (*calls, late))
            only.is_up = True
            for answer in await asyncio.gather(*calls):
                assert torch.equal(answer, expected())
            assert torch.equal(await late, expected(2))

    asyncio.run(main())


def test_without_any_worker_a_call_fails_in_time() -> None:
    async def main() -> None:
        low, high = ExpertDouble(range(4)), ExpertDouble(range(4, 8))
        async with pool_of([low, high]) as pool:
            high.is_up = False
            with pytest.raises(ExpertsUnavailable, match="no worker holds expert 4 of layer 1; waited") as caught:
                await call(pool)
            assert isinstance(caught.value, Unavailable)
            with pytest.raises(ExpertsUnavailable):
                await call(pool)
            assert pool.members[0].state is WorkerState.READY
            assert all(member.rows_in_flight == 0 for member in pool.members)

    asyncio.run(main())


def test_an_answer_that_comes_late_is_discarded() -> None:
    """A worker answers after its caller has left: nothing breaks, and the next call gets its own answer."""
    begun, go_on = threading.Event(), threading.Event()

    def slow(*arguments: object) -> torch.Tensor:
        begun.set()
        go_on.wait(10)
        return tiny.experts(*arguments)  # type: ignore[arg-type]

    async def main() -> None:
        async with pool_of([ExpertDouble(forward=slow)]) as pool:
            leaving = asyncio.create_task(call(pool, layer=0))
            await asyncio.get_running_loop().run_in_executor(None, begun.wait, 10)
            leaving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await leaving
            assert pool.members[0].rows_in_flight == 0
            staying = asyncio.create_task(call(pool))
            go_on.set()
            assert torch.equal(await staying, expected())

    asyncio.run(main())


def test_a_refused_call_is_not_sent_elsewhere() -> None:
    def refuse(*_: object) -> torch.Tensor:
        raise InvalidRequest("counts", "are odd")

    async def main() -> None:
        refusing, slow = ExpertDouble(range(4), refuse), ExpertDouble(range(4, 8))
        async with pool_of([refusing, slow]) as pool:
            with pytest.raises(InvalidRequest):
                await call(pool)
            assert pool.members[0].state is WorkerState.READY
            await until(lambda: all(member.rows_in_flight == 0 for member in pool.members))

    asyncio.run(main())


class TestJoining:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"config_hash": "other"}, "expert worker 0 at double .* serves another model: config hash other"),
            ({"dtype": torch.bfloat16}, "computes in torch.bfloat16, expected torch.float32"),
        ],
    )
    def test_a_worker_of_another_kind_is_refused(self, changes: dict[str, object], message: str) -> None:
        async def main() -> None:
            link = ExpertDouble()
            link.info = dataclasses.replace(link.info, **changes)  # type: ignore[arg-type]
            async with pool_of([link], is_connected=False) as pool:
                with pytest.raises(ConfigError, match=message):
                    await pool.connect(pool.members[0])
                assert pool.members[0].state is WorkerState.JOINING

        asyncio.run(main())

    def test_a_step_must_fit_into_a_call(self) -> None:
        async def main() -> None:
            async with pool_of([ExpertDouble(range(7)), ExpertDouble([7])]) as pool:
                for member in pool.members:
                    assert member.info is not None
                    member.info = dataclasses.replace(member.info, max_rows=100)
                pool.check_rows(50)
                with pytest.raises(
                    ConfigError, match=r"worker 0 .* takes 100 rows in a call, a step of 51 .* send it 102"
                ):
                    pool.check_rows(51)

        asyncio.run(main())

    def test_every_expert_needs_a_holder(self) -> None:
        async def main() -> None:
            async with pool_of([ExpertDouble(range(7))], is_connected=False) as pool:
                await pool.connect(pool.members[0])
                with pytest.raises(ConfigError, match="no expert worker holds expert 7 in layer 0"):
                    pool.place()

        asyncio.run(main())

    def test_a_worker_that_comes_back_with_other_experts_is_used_for_those(self) -> None:
        async def main() -> None:
            changing, stable = ExpertDouble(range(8)), ExpertDouble(range(8))
            async with pool_of([changing, stable]) as pool:
                changing.is_up = False
                await call(pool)
                changing.info, changing.is_up = expert_info([2, 3]), True
                await until(lambda: pool.members[0].state is WorkerState.READY)
                changing.calls.clear()
                assert torch.equal(await call(pool), expected())
                assert {expert for _, ids in changing.calls for expert in ids} <= {2, 3}

        asyncio.run(main())

    def test_a_worker_that_comes_back_without_what_only_it_held_is_used_for_the_rest(self) -> None:
        async def main() -> None:
            only = ExpertDouble(range(8))
            async with pool_of([only]) as pool:
                only.is_up = False
                with pytest.raises(ExpertsUnavailable):
                    await call(pool)
                only.info, only.is_up = expert_info(range(7)), True
                await until(lambda: pool.members[0].is_usable)
                with pytest.raises(ExpertsUnavailable, match="no worker holds expert 7"):
                    await call(pool)
                chosen = pool.choose(1)
                assert list(chosen.values()) == [0] * 7 + [NOBODY]
                plan = dispatch.plan(IDS_TK % 7, WEIGHTS_TK, chosen)
                rows_ND = dispatch.gather(plan, X_TD)
                await pool.forward(0, 1, plan.shards, rows_ND, Legs())

        asyncio.run(main())

    @pytest.mark.parametrize(
        "changes",
        [{"max_rows": 101}, {"config_hash": "other"}, {"experts": ((8, 0, 3),)}, {"experts": ((0, 0, 4),)}],
        ids=str,
    )
    def test_a_worker_that_comes_back_unfit_is_not_used(self, changes: dict[str, object]) -> None:
        async def main() -> None:
            changing, stable = ExpertDouble(), ExpertDouble()
            async with pool_of([changing, stable]) as pool:
                pool.check_rows(51)
                changing.is_up = False
                await call(pool)
                fit = changing.info
                changing.info = dataclasses.replace(fit, **changes)  # type: ignore[arg-type]
                changing.is_up = True
                asked = changing.num_described
                await until(lambda: changing.num_described > asked + 2)
                assert pool.members[0].state is WorkerState.SUSPECT, "however often it is asked"
                changing.info = fit
                await until(lambda: pool.members[0].is_usable)

        asyncio.run(main())


class TestMembership:
    def test_a_worker_that_is_added_is_used(self) -> None:
        async def main() -> None:
            first, second = ExpertDouble(), ExpertDouble()
            async with pool_of([first]) as pool:
                second.is_up = False
                member = pool.add(second)
                assert member.index == 1
                assert torch.equal(await call(pool), expected())
                assert second.calls == []
                second.is_up = True
                await until(lambda: member.is_usable)
                assert torch.equal(await call(pool), expected())
                assert second.calls != []

        asyncio.run(main())

    def test_a_call_waits_for_a_worker_that_is_added(self) -> None:
        async def main() -> None:
            only = ExpertDouble()
            async with pool_of([only], PATIENT) as pool:
                only.is_up = False
                waiting = asyncio.create_task(call(pool))
                await until(lambda: pool.members[0].state is WorkerState.SUSPECT)
                pool.add(ExpertDouble())
                assert torch.equal(await waiting, expected())

        asyncio.run(main())

    def test_a_worker_that_is_removed_answers_what_it_has(self) -> None:
        begun, go_on = threading.Event(), threading.Event()

        def slow(*arguments: object) -> torch.Tensor:
            begun.set()
            go_on.wait(10)
            return tiny.experts(*arguments)  # type: ignore[arg-type]

        async def main() -> None:
            leaving = ExpertDouble(forward=slow)
            async with pool_of([leaving], PATIENT) as pool:
                waiting = asyncio.create_task(call(pool))
                await asyncio.get_running_loop().run_in_executor(None, begun.wait, 10)
                pool.remove(pool.members[0])
                pool.remove(pool.members[0])
                assert pool.members[0].state is WorkerState.DRAINING
                replica = pool.add(ExpertDouble())
                await until(lambda: replica.is_usable)
                num_calls = len(leaving.calls)
                assert torch.equal(await call(pool), expected())
                assert len(leaving.calls) == num_calls, "who leaves gets no work"
                assert not waiting.done()
                go_on.set()
                assert torch.equal(await waiting, expected())
                await until(lambda: pool.members == [replica])
                assert pool.add(ExpertDouble()).index == 2, "an index is never given twice"

        asyncio.run(main())

    def test_a_discovery_is_followed(self) -> None:
        async def main() -> None:
            async with pool_of([ExpertDouble()]) as pool:
                made: dict[str, ExpertDouble] = {}

                def make(address: str) -> ExpertDouble:
                    made[address] = ExpertDouble()
                    made[address].address = address
                    return made[address]

                pool.follow(Changes(added=("b", "c")), make)
                await until(lambda: [each.is_usable for each in pool.members] == [True] * 3)
                pool.follow(Changes(removed=("double [0, 1, 2, 3, 4, 5, 6, 7]", "b", "unknown")), make)
                assert torch.equal(await call(pool), expected())
                assert made["b"].calls == []
                await until(lambda: [each.link.address for each in pool.members] == ["c"])

        asyncio.run(main())

    def test_a_worker_that_drains_gets_no_work_until_another_process_answers(self) -> None:
        async def main() -> None:
            draining, stable = FaultyExpert({0: Fault.DRAIN}), ExpertDouble()
            async with pool_of([draining, stable]) as pool:
                draining.info = dataclasses.replace(draining.info, is_draining=True)
                assert torch.equal(await call(pool), expected())
                assert pool.members[0].state is WorkerState.DRAINING
                assert pool.counters.retries[Cause.DRAINING] == 1
                asked = draining.num_described
                await until(lambda: draining.num_described > asked + 2)
                assert pool.members[0].state is WorkerState.DRAINING
                draining.is_up = False
                await until(lambda: pool.members[0].state is WorkerState.SUSPECT)
                draining.info, draining.is_up = expert_info(incarnation="two"), True
                await until(lambda: pool.members[0].is_usable)

        asyncio.run(main())

    def test_a_worker_away_for_long_is_dead_and_comes_back(self) -> None:
        async def main() -> None:
            settings = ExpertPoolSettings(probe_interval=0.005, probe_interval_max=0.01, dead_after=0.03)
            lost, stable = ExpertDouble(), ExpertDouble()
            async with pool_of([lost, stable], settings) as pool:
                lost.is_up = False
                await call(pool)
                await until(lambda: pool.members[0].state is WorkerState.DEAD)
                assert torch.equal(await call(pool), expected())
                lost.is_up = True
                await until(lambda: pool.members[0].is_usable)

        asyncio.run(main())


class TestExpertsThatNobodyHolds:
    """A step must not wait for an expert that none of its rows is for."""

    async def rows_for(self, pool: ExpertPool, experts: list[int]) -> torch.Tensor:
        plan = dispatch.plan(torch.tensor([experts]), torch.ones(1, len(experts)), pool.choose(1))
        rows_ND = await pool.forward(0, 1, plan.shards, dispatch.gather(plan, X_TD[:1]), Legs())
        return rows_ND[plan.row_of_rank_TK.reshape(-1)]

    def test_only_rows_for_it_wait(self) -> None:
        async def main() -> None:
            low, high = ExpertDouble(range(4)), ExpertDouble(range(4, 8))
            async with pool_of([low, high], PATIENT) as pool:
                high.is_up = False
                waiting = asyncio.create_task(self.rows_for(pool, [1, 5]))
                await until(lambda: pool.members[1].state is WorkerState.SUSPECT)
                rows_ND = await self.rows_for(pool, [2, 3])
                assert torch.equal(rows_ND, tiny.experts(1, (2, 3), (1, 1), X_TD[[0, 0]]))
                late = asyncio.create_task(self.rows_for(pool, [0, 7]))
                num_calls = len(low.calls)
                await until(lambda: len(low.calls) > num_calls)
                assert not waiting.done()
                assert not late.done(), "its other half is computed meanwhile"
                high.is_up = True
                assert torch.equal(await waiting, tiny.experts(1, (1, 5), (1, 1), X_TD[[0, 0]]))
                assert torch.equal(await late, tiny.experts(1, (0, 7), (1, 1), X_TD[[0, 0]]))

        asyncio.run(main())

    def test_the_step_s_own_deadline_ends_the_wait(self) -> None:
        async def main() -> None:
            only = ExpertDouble()
            async with pool_of([only], PATIENT) as pool:
                only.is_up = False
                plan = dispatch.plan(IDS_TK, WEIGHTS_TK, pool.choose(1))
                deadline = time.monotonic() + 0.05
                with pytest.raises(ExpertsUnavailable) as caught:
                    await pool.forward(0, 1, plan.shards, dispatch.gather(plan, X_TD), Legs(), deadline)
                assert caught.value.retry_after > 0
                assert time.monotonic() < deadline + 5

        asyncio.run(main())
