"""Rows beside the stream, by gloo, to the real service: the values of the local path, in step whatever happens."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch

from expert_worker.engine import ExpertEngine
from expert_worker.forward_stream import ForwardStream
from expert_worker.service import ExpertService
from grokmoe.device_thread import DeviceThread
from grokmoe.errors import ConfigError, DeadlineExceeded, FailedPrecondition, InvalidRequest, Unavailable
from grokmoe.pairs import GLOO, NCCL
from grokmoe.server import RoleServer
from grokmoe.telemetry import ExpertMetrics, RouterMetrics, new_registry
from grokmoe.v1 import expert_pb2
from router.transport import pair_offers
from router.transport.pair_expert import PairExpertLink, expert_links
from router.transport.pair_offers import ExpertTransportSettings, PairOffers, Pauses
from router.transport.worker_access import PLAIN
from tests.router import tiny
from tests.router.test_transport_grpc import SlowExperts, call_of
from tests.router.tiny import CONFIG, until

pytestmark = pytest.mark.usefixtures("both_streams")


@pytest.fixture
def offers() -> PairOffers:
    return PairOffers(ExpertTransportSettings(expert_transport=GLOO), RouterMetrics(new_registry()))


@pytest.fixture
def address(tmp_path: Path) -> Path:
    tiny.expert_set()
    return tmp_path / "socket"


@contextlib.asynccontextmanager
async def paired(address: Path, offers: PairOffers, lane: int = 0) -> AsyncIterator[PairExpertLink]:
    """A link whose lane has a pair."""
    link = PairExpertLink(f"unix:{address}", offers)
    try:
        await link.describe()
        await check(link, 1, lane)
        await until(lambda: link._pairs[lane].is_free)
        yield link
    finally:
        await link.close()


class Gone:
    """What is left of a process group."""

    def send(self, *_: object) -> None:
        raise RuntimeError("Connection closed by peer")

    receive = send

    def abort(self) -> None:
        pass


def calls(offers: PairOffers) -> int:
    """That went both ways by a pair so far."""
    return int(offers.metrics.pair_calls._value.get())


def losses(offers: PairOffers) -> int:
    return int(offers.metrics.pair_losses._value.get())


async def check(link: PairExpertLink, number: int, lane: int = 0) -> None:
    async with asyncio.timeout(tiny.TIMEOUT):
        reply = await link.forward(lane, *call_of(number))
    assert torch.equal(reply.rows_ND, tiny.experts(*call_of(number))), "bit for bit"


async def check_by_pair(link: PairExpertLink, offers: PairOffers, number: int, lane: int = 0) -> None:
    """The values, and that they came by the pair."""
    before = calls(offers)
    await check(link, number, lane)
    assert calls(offers) == before + 1


def test_values_are_those_of_the_local_path(address: Path, offers: PairOffers) -> None:
    """Uneven numbers of rows, one after the other; none at all, which need no pair."""

    async def main() -> None:
        async with SlowExperts(address), paired(address, offers) as link:
            for number in range(12):
                await check_by_pair(link, offers, number)
            before = calls(offers)
            empty = torch.empty(0, CONFIG.hidden_size)
            assert (await link.forward(0, 1, (2, 5), (0, 0), empty)).rows_ND.shape == empty.shape
            assert (calls(offers), losses(offers)) == (before, 0)

    asyncio.run(main())


def test_more_calls_than_one_at_a_time_go_in_messages(address: Path, offers: PairOffers) -> None:
    async def main() -> None:
        async with SlowExperts(address), paired(address, offers) as link:
            before = calls(offers)
            await asyncio.gather(*(check(link, number) for number in range(20)))
            assert 1 <= calls(offers) - before < 20
            await check_by_pair(link, offers, 3)

    asyncio.run(main())


def test_every_lane_has_its_own(address: Path, offers: PairOffers) -> None:
    async def main() -> None:
        async with SlowExperts(address) as worker, paired(address, offers) as link:
            await check(link, 1, lane=1)
            await until(lambda: link._pairs[1].is_free)
            before = calls(offers)
            worker.hold()
            both = [asyncio.create_task(check(link, number, lane=number)) for number in (0, 1)]
            await until(lambda: worker.device.num_waiting == 2)
            worker.release()
            await asyncio.gather(*both)
            assert calls(offers) == before + 2
            link.reset(0)
            await check_by_pair(link, offers, 4, lane=1)

    asyncio.run(main())


def test_a_refused_call_leaves_both_ends_in_step(address: Path, offers: PairOffers) -> None:
    async def main() -> None:
        async with SlowExperts(address), paired(address, offers) as link:
            with pytest.raises(InvalidRequest) as caught:
                await link.forward(0, 99, (0,), (1,), torch.zeros(1, CONFIG.hidden_size))
            assert caught.value.field == "layer"
            with pytest.raises(FailedPrecondition, match="not held"):
                await link.forward(0, 0, (0, 1), (1, 0), torch.zeros(1, CONFIG.hidden_size))
            for number in range(3):
                await check_by_pair(link, offers, number)
            assert losses(offers) == 0

    def without_expert_one() -> Any:
        experts = tiny.expert_set()
        weights = experts.layers[0]
        return weights.resized([expert for expert in weights.expert_ids if expert != 1])

    experts = tiny.expert_set()
    old = experts.layers
    experts.replace(0, without_expert_one())
    try:
        asyncio.run(main())
    finally:
        experts.layers = old


def test_a_call_that_is_cancelled_is_fetched_all_the_same(address: Path, offers: PairOffers) -> None:
    """Meanwhile the others go in messages, and the next one by the pair is not given its answer."""

    async def main() -> None:
        async with SlowExperts(address) as worker, paired(address, offers) as link:
            worker.hold()
            leaving = asyncio.create_task(link.forward(0, *call_of(1)))
            await until(lambda: worker.device.num_waiting == 1)
            leaving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await leaving
            assert not link._pairs[0].is_free
            staying = asyncio.create_task(check(link, 2))
            await until(lambda: worker.device.num_waiting == 2)
            worker.release()
            await staying
            await until(lambda: link._pairs[0].is_free)
            await check_by_pair(link, offers, 3)
            assert losses(offers) == 0

    asyncio.run(main())


def test_a_call_without_time_to_begin(address: Path, offers: PairOffers) -> None:
    async def main() -> None:
        async with SlowExperts(address) as worker, paired(address, offers) as link:
            worker.hold()
            with pytest.raises(DeadlineExceeded, match="nobody waits"):
                await link.forward(0, *call_of(1), timeout=0.05)
            worker.release()
            await check_by_pair(link, offers, 2)

    asyncio.run(main())


def test_a_lane_that_is_reset_owes_nothing(address: Path, offers: PairOffers, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with SlowExperts(address) as worker, paired(address, offers) as link:
            worker.hold()
            given_up = asyncio.create_task(link.forward(0, *call_of(1)))
            await until(lambda: worker.device.num_waiting == 1)
            link.reset(0)
            with pytest.raises(Unavailable, match="closed"):
                await given_up
            waiting = asyncio.create_task(check(link, 3))
            worker.release()
            await waiting
            assert losses(offers) == 1
            assert not link._pairs[0].is_open, "it was the pair that kept somebody waiting, as far as is known"
            monkeypatch.setattr(link._pauses, "_next_at", 0.0)
            await check(link, 4)
            await until(lambda: link._pairs[0].is_free)
            await check_by_pair(link, offers, 5)

    asyncio.run(main())


@pytest.mark.parametrize("whose", ["worker", "router"])
def test_a_pair_that_breaks_is_fallen_back_from_and_returned_to(
    address: Path, offers: PairOffers, monkeypatch: pytest.MonkeyPatch, whose: str
) -> None:
    """The call that meets it is answered all the same, by the same worker over the same stream."""

    async def main() -> None:
        async with SlowExperts(address) as worker, paired(address, offers) as link:
            stream = link.stream(0)
            (served,) = worker.service._streams
            pair: Any = served._pair._pair if whose == "worker" else link._pairs[0]._pair
            pair._thread.post(lambda: setattr(pair, "_ranks", Gone()))  # its connections close, and nobody is told
            await asyncio.sleep(0.05)
            await check(link, 3)
            assert (losses(offers), link._pairs[0].is_open) == (1, False)
            before = calls(offers)
            await check(link, 4)
            assert calls(offers) == before, "the pause is not over"
            monkeypatch.setattr(link._pauses, "_next_at", 0.0)
            await check(link, 5)
            await until(lambda: link._pairs[0].is_free)
            await check_by_pair(link, offers, 6)
            assert link.stream(0) is stream

    asyncio.run(main())


def test_a_pair_that_breaks_before_the_answer(address: Path, offers: PairOffers) -> None:
    async def main() -> None:
        async with SlowExperts(address) as worker, paired(address, offers) as link:
            worker.hold()
            asking = asyncio.create_task(check(link, 1))
            await until(lambda: worker.device.num_waiting == 1)
            (served,) = worker.service._streams
            served._pair.close()  # the answer comes in a message then
            worker.release()
            await asking
            asking = asyncio.create_task(check(link, 2))
            await asking
            assert losses(offers) == 1

    asyncio.run(main())


def test_announced_sizes_that_do_not_fit(address: Path, offers: PairOffers) -> None:
    """More rows than the worker takes: refused as in messages, after the pair was given up without a transfer."""

    async def main() -> None:
        async with SlowExperts(address), paired(address, offers) as link:
            with pytest.raises(InvalidRequest, match="limit is 100"):
                await link.forward(0, 0, (0,), (101,), torch.zeros(101, CONFIG.hidden_size))
            assert losses(offers) == 1
            await check(link, 1)

    asyncio.run(main())


def test_a_worker_that_wants_no_pairs(address: Path, offers: PairOffers) -> None:
    async def main() -> None:
        async with SlowExperts(address) as worker:
            worker.service._takes_pairs = False
            link = PairExpertLink(f"unix:{address}", offers)
            for number in range(3):
                await check(link, number)
            await until(lambda: not link._pauses.is_over)
            assert (calls(offers), losses(offers)) == (0, 0), "nothing has broken"
            await link.close()

    asyncio.run(main())


def test_a_worker_that_does_not_know_pairs(address: Path, offers: PairOffers, monkeypatch: pytest.MonkeyPatch) -> None:
    """An offer is to it a request without rows."""

    async def old_worker(self: ForwardStream, request: expert_pb2.ForwardRequest) -> None:
        request.ClearField("pair_offer")
        await self._take(request, None)

    monkeypatch.setattr(ForwardStream, "_take_offer", old_worker)

    async def main() -> None:
        async with SlowExperts(address):
            link = PairExpertLink(f"unix:{address}", offers)
            for number in range(3):
                await check(link, number)
            await until(lambda: not link._pauses.is_over)
            assert calls(offers) == 0
            await link.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": ""}, "pair_offer.name"),
        ({"name": "x" * 65}, "pair_offer.name"),
        ({"host": ""}, "pair_offer.host"),
        ({"port": 70000}, "pair_offer.port"),
        ({"backend": "mpi"}, "there is no backend"),
        ({"backend": NCCL}, "nccl"),
    ],
)
def test_offers_that_are_refused(address: Path, offers: PairOffers, change: dict[str, Any], said: str) -> None:
    offer = {"backend": GLOO, "host": "127.0.0.1", "port": 1, "name": "x"} | change

    async def main() -> None:
        async with SlowExperts(address):
            link = PairExpertLink(f"unix:{address}", offers)
            request = expert_pb2.ForwardRequest(pair_offer=expert_pb2.PairOffer(**offer))
            header, _ = await link.stream(3).call(request, None)
            assert said in f"{header.failure}"
            await link.close()

    asyncio.run(main())


def test_rows_said_to_come_by_a_pair_that_is_not_there(address: Path, offers: PairOffers) -> None:
    async def main() -> None:
        async with SlowExperts(address):
            link = PairExpertLink(f"unix:{address}", offers)
            request = expert_pb2.ForwardRequest(layer=0, expert_ids=(0,), counts=(1,), pair_bytes=4 * 192)
            header, _ = await link.stream(3).call(request, None)
            assert header.pair_lost
            await link.close()

    asyncio.run(main())


def test_a_worker_that_drains_refuses_in_step(address: Path, offers: PairOffers) -> None:
    async def main() -> None:
        async with SlowExperts(address) as worker, paired(address, offers) as link:
            worker.service.drain()
            with pytest.raises(Unavailable, match="about to end"):
                await link.forward(0, *call_of(1))
            assert losses(offers) == 0

    asyncio.run(main())


def test_pauses() -> None:
    now = [0.0]
    pauses = Pauses(lambda: now[0])
    assert pauses.is_over
    lengths = []
    for _ in range(9):
        pauses.broken()
        begin = now[0]
        while not pauses.is_over:
            now[0] += 0.5
        lengths.append(now[0] - begin)
    assert lengths == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    pauses.used()
    pauses.broken()
    now[0] += 1
    assert pauses.is_over
    pauses.refused()
    now[0] += pair_offers.REFUSED_PAUSE - 1
    assert not pauses.is_over


def test_settings_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="pair_port is 70000"):
        ExpertTransportSettings(pair_port=70000)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    with pytest.raises(ConfigError, match="expert_transport is nccl: torch was built without nccl"):
        expert_links(ExpertTransportSettings(expert_transport=NCCL), PLAIN, RouterMetrics(new_registry()))


def test_bfloat16(address: Path, offers: PairOffers, tmp_path: Path) -> None:
    """The type of production."""
    from tests.expert_worker import small_model

    experts = small_model.load(small_model.write(tmp_path / "model"), torch.bfloat16)
    metrics, device = ExpertMetrics(new_registry()), DeviceThread("test-experts")
    service = ExpertService(ExpertEngine(experts, metrics, device), metrics, 4096)
    rows_ND = small_model.draw(3000, dtype=torch.bfloat16)

    async def main() -> None:
        server = RoleServer([service.as_service()])
        await server.start(f"unix:{address}")
        link = PairExpertLink(f"unix:{address}", offers)
        replies = []
        for _ in range(2):
            replies.append((await link.forward(0, 1, (1, 4), (2999, 1), rows_ND)).rows_ND)
            await until(lambda: link._pairs[0].is_free)
        assert calls(offers) == 1
        assert torch.equal(*replies), "in messages, and by the pair"
        await link.close()
        await server.stop(0)

    asyncio.run(main())
    device.stop()
