"""Experts move between real processes while clients stream: nobody fails, no token changes, nobody waits long."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from grokmoe import AsyncClient, FailedPrecondition, FinishReason, GrokmoeError, Status, WorkerRole
from tests import goldens
from tests.cluster.command import running

pytestmark = pytest.mark.cluster

UP = ("up", "--model", str(goldens.DIRECTORY), "--dtype", "float32", "--port", "0", "--kv-gib", "0.001")
PROMPTS = ("len33", "len70")
MAX_TOKENS = 16
LONGEST_GAP = 5.0
"""Seconds between two tokens on a machine that tests share. The stall of a move itself is measured by
benchmarks/moves.py; this one tells a stall from a hang."""


class Load:
    """Clients that stream without a pause, each token held against the undisturbed one."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self.num_done = 0
        self.longest_gap = 0.0
        self.errors: list[str] = []
        self._stop = False

    async def run(self, prompt: str) -> None:
        while not self._stop:
            try:
                await self._stream(prompt)
                self.num_done += 1
            except GrokmoeError as error:
                self.errors.append(f"{type(error).__name__}: {error.message}")

    async def _stream(self, prompt: str) -> None:
        tokens: list[int] = []
        options = {"max_tokens": MAX_TOKENS, "temperature": 0.0, "ignore_eos": True}
        last = None
        async for delta in self._client.stream(goldens.PROMPTS[prompt], **options):  # type: ignore[arg-type]
            now = time.monotonic()
            if last is not None:
                self.longest_gap = max(self.longest_gap, now - last)
            last = now
            tokens += delta.token_ids
            if delta.finish_reason not in (None, FinishReason.LENGTH):
                self.errors.append(f"finished for {delta.finish_reason}")
        if tokens != goldens.greedy("seed", prompt):
            self.errors.append(f"{prompt} became {tokens}")

    def stop(self) -> None:
        self._stop = True

    async def some_more(self, count: int = 4) -> None:
        """Waits for so many more streams to end."""
        wanted = self.num_done + count
        async with asyncio.timeout(60):
            while self.num_done < wanted and not self.errors:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


@asynccontextmanager
async def loaded(client: AsyncClient, prompts: tuple[str, ...] = PROMPTS) -> AsyncIterator[Load]:
    """Streams all the time; at the end, no error and no long gap."""
    load = Load(client)
    tasks = [asyncio.create_task(load.run(prompt)) for prompt in prompts]
    try:
        await load.some_more(2)
        yield load
        await load.some_more()
    finally:
        load.stop()
        await asyncio.gather(*tasks)
    assert load.errors == []
    assert load.longest_gap < LONGEST_GAP


async def addresses(client: AsyncClient) -> list[str]:
    """Of the expert workers, by index."""
    workers = [worker for worker in (await client.status()).workers if worker.role is WorkerRole.EXPERT]
    return [worker.address for worker in sorted(workers, key=lambda worker: worker.index)]


async def until(client: AsyncClient, holds: Callable[[Status], bool]) -> None:
    async with asyncio.timeout(60):
        while not holds(await client.status()):  # noqa: ASYNC110
            await asyncio.sleep(0.05)


def with_cluster(tmp_path: Path, *flags: str, use: Callable[[AsyncClient, list[int]], Awaitable[None]]) -> None:
    """Starts a cluster. use: gets a client and the process ids of the expert workers."""
    state_file = tmp_path / "state.json"

    async def main(address: str) -> None:
        processes = json.loads(state_file.read_text())["processes"]
        async with AsyncClient(address, retries=0) as client:
            await use(client, [each["pid"] for each in processes if each["role"] == "expert"])

    with running(*UP, "--state", str(state_file), *flags) as up:
        asyncio.run(main(up.wait_ready()))
        assert up.stop() == 0


def test_every_expert_goes_round_under_load(tmp_path: Path) -> None:
    async def use(client: AsyncClient, _: list[int]) -> None:
        workers = await addresses(client)
        async with loaded(client) as load:
            for expert in range(8):
                status = await client.status()
                (at,) = status.placement[expert].workers
                cost = await client.move_experts(expert, source=workers[at], target=workers[1 - at])
                assert cost.loaded_bytes > 0
                await load.some_more(1)
            for expert in (0, 5):
                status = await client.status()
                (at,) = status.placement[expert].workers
                await client.move_experts(expert, target=workers[1 - at])
                assert len((await client.status()).placement[expert].workers) == 2
                await load.some_more(1)
                await client.move_experts(expert, source=workers[at])
                with pytest.raises(FailedPrecondition, match="last ready holder"):
                    await client.move_experts(expert, source=workers[1 - at])
        status = await client.status()
        assert status.moves == ()
        assert all(len(placed.workers) == 1 for placed in status.placement)

    with_cluster(tmp_path, "--experts", "2", use=use)


def test_a_target_killed_while_it_loads(tmp_path: Path) -> None:
    """Stopped first, so that it is in the middle for sure. What it held is on other workers, too."""

    async def use(client: AsyncClient, pids: list[int]) -> None:
        workers = await addresses(client)
        before = (await client.status()).placement[0].workers
        target = next(index for index in range(3) if index not in before)
        async with loaded(client) as load:
            os.kill(pids[target], signal.SIGSTOP)
            move = asyncio.create_task(client.move_experts(0, source=workers[before[0]], target=workers[target]))
            await until(client, lambda status: bool(status.moves) or move.done())
            os.kill(pids[target], signal.SIGKILL)
            with pytest.raises(GrokmoeError):
                await move
            await load.some_more()
            status = await client.status()
            assert status.placement[0].workers == before
            assert status.moves == ()

    with_cluster(tmp_path, "--experts", "3", "--expert-replicas", "2", use=use)


def test_a_source_killed_while_it_drains(tmp_path: Path) -> None:
    async def use(client: AsyncClient, pids: list[int]) -> None:
        workers = await addresses(client)
        before = (await client.status()).placement[0].workers
        target = next(index for index in range(3) if index not in before)
        async with loaded(client) as load:
            os.kill(pids[before[0]], signal.SIGSTOP)
            move = asyncio.create_task(client.move_experts(0, source=workers[before[0]], target=workers[target]))
            await until(client, lambda status: any(each.phase == "draining" for each in status.moves) or move.done())
            os.kill(pids[before[0]], signal.SIGKILL)
            await load.some_more()
            status = await client.status()
            assert target in status.placement[0].workers
            assert before[0] not in status.placement[0].workers

    with_cluster(tmp_path, "--experts", "3", "--expert-replicas", "2", use=use)


def test_a_skewed_load_is_evened_out(tmp_path: Path) -> None:
    """The placement that the cluster starts with puts everything on one of three workers' shoulders."""

    async def use(client: AsyncClient, _: list[int]) -> None:
        workers = await addresses(client)
        for expert in range(8):
            (at,) = (await client.status()).placement[expert].workers
            if at != 0 and expert not in (3, 7):
                await client.move_experts(expert, source=workers[at], target=workers[0])
        async with loaded(client) as load:
            async with asyncio.timeout(120):
                while (before := (await client.rebalance_experts(dry_run=True))).reason.startswith("fewer"):
                    await load.some_more(2)
            found = await client.rebalance_experts(force=True)
            assert found.done, found
            assert found.forecast_imbalance < before.imbalance
            await load.some_more(8)
            await until(client, lambda status: status.imbalance > 0)
            after = (await client.status()).imbalance
        assert after < found.imbalance
        assert after < 0.5 * (1 + found.imbalance)

    with_cluster(tmp_path, "--experts", "3", use=use)
