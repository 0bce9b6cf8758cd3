"""Pairs: what goes over, and every way one can end. The other end is a process of its own where that matters."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from grokmoe.errors import ConfigError, FailedPrecondition
from grokmoe.pairs import GLOO, NCCL, Pair, PairBroken, Rank, Rendezvous, check_backend, pair, ranks
from grokmoe.v1 import expert_pb2

CPU = torch.device("cpu")
TIMEOUT = 60.0


@pytest.fixture(scope="module")
def rendezvous() -> Rendezvous:
    return Rendezvous("127.0.0.1")


@contextlib.asynccontextmanager
async def both_ends(rendezvous: Rendezvous) -> AsyncIterator[tuple[Pair, Pair]]:
    """Both in this process."""
    offer = rendezvous.offer(GLOO)
    ends = [Pair(offer, rank, CPU) for rank in Rank]
    try:
        async with asyncio.timeout(TIMEOUT):
            await asyncio.gather(*(end.open() for end in ends))
        yield ends[0], ends[1]
    finally:
        for end in ends:
            end.close()


@contextlib.contextmanager
def peer(offer: expert_pb2.PairOffer, *script: str) -> Iterator[subprocess.Popen[bytes]]:
    """Another process at the other end, see pair_peer."""
    command = [sys.executable, "-m", "tests.shared.pair_peer", offer.SerializeToString().hex(), *script]
    process = subprocess.Popen(command)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def opened(offer: expert_pb2.PairOffer) -> Pair:
    end = Pair(offer, Rank.ROUTER, CPU)
    async with asyncio.timeout(TIMEOUT):
        await end.open()
    return end


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


async def threads_end() -> None:
    """Waits until no pair has a thread any more."""
    async with asyncio.timeout(TIMEOUT):
        while any(each.name.startswith("pair-") for each in threading.enumerate()):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_rows", [0, 1, 7, 3000])
def test_values_there_and_back(rendezvous: Rendezvous, num_rows: int, dtype: torch.dtype) -> None:
    """Bit for bit, also of what is not contiguous; none, and several MB."""

    async def main() -> None:
        rows_ND = draw(num_rows, 520, dtype=dtype)[:, ::2]
        async with both_ends(rendezvous) as (router, worker):
            for _ in range(2):
                _, there = await asyncio.gather(router.send(rows_ND), worker.receive(rows_ND.shape, dtype))
                _, back = await asyncio.gather(worker.send(there), router.receive(there.shape, dtype))
                assert torch.equal(back, rows_ND)
        await threads_end()

    asyncio.run(main())


@pytest.mark.cluster
def test_rows_of_uneven_number_to_another_process(rendezvous: Rendezvous) -> None:
    async def main() -> None:
        offer = rendezvous.offer(GLOO)
        shapes = [(5, 3), (1, 300), (0, 8), (4096, 128), (2, 1)]
        with peer(offer, *(f"{rows}x{width}" for rows, width in shapes)) as process:
            end = await opened(offer)
            for shape in shapes:
                await end.send(draw(*shape))
                assert torch.equal(await end.receive(shape, torch.float32), 2 * draw(*shape))
            assert process.wait(TIMEOUT) == 0
            end.close()

    asyncio.run(main())


@pytest.mark.cluster
@pytest.mark.parametrize("direction", ["send", "receive"])
def test_a_peer_killed_in_mid_transfer_ends_its_pair_alone(rendezvous: Rendezvous, direction: str) -> None:
    """It has stopped before, so that the transfer has begun and cannot end."""

    async def main() -> None:
        offer, other_offer = rendezvous.offer(GLOO), rendezvous.offer(GLOO)
        with peer(offer, "stop") as process, peer(other_offer, "2x2", "2x2"):
            end, other = await opened(offer), await opened(other_offer)
            # More than the sockets' buffers hold.
            work = end.send(draw(8192, 1024)) if direction == "send" else end.receive((3, 4), torch.float32)
            transfer = asyncio.ensure_future(work)
            await asyncio.sleep(0.3)
            assert not transfer.done()
            await other.send(draw(2, 2))
            process.kill()
            with pytest.raises(PairBroken):
                await asyncio.wait_for(transfer, TIMEOUT)
            with pytest.raises(PairBroken):
                await end.send(draw(1, 1))
            assert torch.equal(await other.receive((2, 2), torch.float32), 2 * draw(2, 2))
            await other.send(draw(2, 2))
            assert torch.equal(await other.receive((2, 2), torch.float32), 2 * draw(2, 2))
            other.close()
        await threads_end()

    asyncio.run(main())


@pytest.mark.cluster
def test_a_peer_that_hangs_is_given_up_at_the_limit(rendezvous: Rendezvous, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair, "LEAST_LIMIT", 0.3)

    async def main() -> None:
        offer = rendezvous.offer(GLOO)
        with peer(offer, "stop") as process:
            end = await opened(offer)
            began = time.monotonic()
            with pytest.raises(PairBroken):
                await end.receive((3, 4), torch.float32)
            assert 0.3 <= time.monotonic() - began < TIMEOUT
            process.send_signal(signal.SIGCONT)
        await threads_end()

    asyncio.run(main())


def test_the_loop_goes_on_while_an_end_waits(rendezvous: Rendezvous) -> None:
    async def main() -> None:
        async with both_ends(rendezvous) as (router, worker):
            receiving = asyncio.ensure_future(worker.receive((1, 2), torch.float32))
            for _ in range(20):
                await asyncio.sleep(0.001)
            assert not receiving.done()
            await router.send(draw(1, 2))
            await receiving

    asyncio.run(main())


def test_a_transfer_that_is_cut_off_ends_the_pair(rendezvous: Rendezvous, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ends learn of it: the other one with its next transfer."""
    monkeypatch.setattr(pair, "LEAST_LIMIT", 0.3)

    async def main() -> None:
        async with both_ends(rendezvous) as (router, worker):
            receiving = asyncio.ensure_future(worker.receive((1, 2), torch.float32))
            await asyncio.sleep(0.01)
            receiving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await receiving
            with pytest.raises(PairBroken, match="cut off"):
                await worker.receive((1, 2), torch.float32)
            await threads_of(1)
            with pytest.raises(PairBroken):
                await router.send(draw(1, 2))

    async def threads_of(num: int) -> None:
        async with asyncio.timeout(TIMEOUT):
            while sum(each.name.startswith("pair-") for each in threading.enumerate()) > num:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    asyncio.run(main())


def test_nobody_at_the_other_end(rendezvous: Rendezvous, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair, "OPEN_LIMIT", 0.3)
    with pytest.raises(PairBroken):
        asyncio.run(opened(rendezvous.offer(GLOO)))


def test_nobody_at_the_rendezvous(monkeypatch: pytest.MonkeyPatch) -> None:
    from datetime import timedelta

    from grokmoe.pairs import rendezvous as module

    monkeypatch.setattr(module, "STORE_TIMEOUT", timedelta(seconds=0.3))
    with pytest.raises(PairBroken):
        asyncio.run(opened(expert_pb2.PairOffer(backend=GLOO, host="127.0.0.1", port=9, name="x")))


def test_a_rendezvous_that_cannot_be(rendezvous: Rendezvous) -> None:
    with pytest.raises(ConfigError, match="cannot meet at"):
        Rendezvous("no-such-host.invalid")
    with pytest.raises(ConfigError, match="cannot meet at"):
        Rendezvous("127.0.0.1", rendezvous.port)


def test_offers_are_never_the_same(rendezvous: Rendezvous) -> None:
    offers = [rendezvous.offer(GLOO) for _ in range(50)]
    assert len({offer.name for offer in offers}) == 50
    assert {(offer.host, offer.port) for offer in offers} == {("127.0.0.1", rendezvous.port)}


def test_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    check_backend(GLOO, CPU)
    with pytest.raises(FailedPrecondition, match="there is no backend 'mpi'"):
        check_backend("mpi", CPU)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    with pytest.raises(FailedPrecondition, match="built without nccl"):
        check_backend(NCCL, CPU)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    with pytest.raises(FailedPrecondition, match="what is on GPUs"):
        check_backend(NCCL, CPU)
    check_backend(NCCL, torch.device("cuda:1"))


class Work:
    """A transfer of NCCL's that is done after so many looks; None: never."""

    def __init__(self, looks: int | None, error: str = "") -> None:
        self.looks, self.error = looks, error

    def is_completed(self) -> bool:
        if self.looks is None:
            return False
        self.looks -= 1
        return self.looks < 0

    def wait(self) -> bool:
        if self.error:
            raise RuntimeError(self.error)
        return True


class Group:
    """A ProcessGroupNCCL that says what it was asked."""

    Options = SimpleNamespace
    work: Callable[[], Work] = lambda: Work(3)

    def __init__(self, store: Any, rank: int, size: int, options: Any) -> None:
        self.asked: list[Any] = [(rank, size)]

    def set_timeout(self, timeout: Any) -> None:
        self.asked.append(timeout.total_seconds())

    def send(self, tensors: list[torch.Tensor], other: int, tag: int) -> Work:
        self.asked.append(("send", len(tensors), other))
        return type(self).work()

    def recv(self, tensors: list[torch.Tensor], other: int, tag: int) -> Work:
        self.asked.append(("recv", len(tensors), other))
        return type(self).work()

    def abort(self) -> None:
        self.asked.append("abort")


@pytest.fixture
def nccl(monkeypatch: pytest.MonkeyPatch) -> ranks.NcclRanks:
    monkeypatch.setattr(torch.distributed, "ProcessGroupNCCL", Group, raising=False)
    for name in ranks.NCCL_ENVIRONMENT:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    made = ranks.new_ranks(NCCL, None, Rank.WORKER, 5.0)
    assert isinstance(made, ranks.NcclRanks)
    return made


class TestNccl:
    """What we make of it; what NCCL makes of that needs two GPUs."""

    def test_transfers(self, nccl: ranks.NcclRanks) -> None:
        nccl.send(draw(2, 2), 1.0)
        nccl.receive(draw(2, 2), 1.0)
        assert nccl._group.asked == [(1, 2), 5.0, ("send", 1, 0), ("recv", 1, 0)]

    def test_a_peer_that_hangs_is_given_up_at_the_limit(
        self, nccl: ranks.NcclRanks, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Group, "work", lambda: Work(None))
        with pytest.raises(RuntimeError, match=r"within 0\.05 s"):
            nccl.send(draw(2, 2), 0.05)
        assert nccl._group.asked[-1] == "abort"

    def test_an_abort_from_another_thread(self, nccl: ranks.NcclRanks, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Group, "work", lambda: Work(None))
        threading.Timer(0.05, nccl.abort).start()
        with pytest.raises(RuntimeError, match="aborted"):
            nccl.receive(draw(2, 2), TIMEOUT)
        assert nccl._group.asked[-1] == "abort"

    def test_an_error_of_the_watchdog(self, nccl: ranks.NcclRanks, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Group, "work", lambda: Work(0, "NCCL communicator was aborted"))
        with pytest.raises(RuntimeError, match="was aborted"):
            nccl.send(draw(2, 2), 1.0)
