"""Attention workers of several ranks as real processes: goldens, and what becomes of requests when a rank dies."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from grokmoe import AsyncClient, Client
from tests import goldens
from tests.cluster.command import Command, running
from tests.cluster.test_up import UP, is_alive, wait_dead
from tests.numerics.test_topologies import check_all
from tests.topologies import Setup, processes

pytestmark = pytest.mark.cluster


@pytest.mark.parametrize("size", [2, 3])
def test_goldens(size: int) -> None:
    """Logits and tokens through a router; two ranks split the KV heads, the second of three reads both."""
    asyncio.run(check_all(processes, Setup(goldens.DIRECTORY, num_experts=2, tensor_parallel=size), "seed", False))


def started(up: Command, state_file: Path) -> list[dict[str, Any]]:
    up.wait_ready()
    listed: list[dict[str, Any]] = json.loads(state_file.read_text())["processes"]
    return listed


def pid_of(listed: list[dict[str, Any]], role: str, index: int) -> int:
    return next(int(each["pid"]) for each in listed if (each["role"], each["index"]) == (role, index))


def wait_said(up: Command, words: str) -> None:
    """Fails unless the command soon says so on standard error."""
    deadline = time.monotonic() + 10.0
    while not any(words in line for line in up.errors):
        assert time.monotonic() < deadline, f"never said: {words}"
        time.sleep(0.05)


def test_up_lists_ranks_and_ends_them(tmp_path: Path) -> None:
    state_file = tmp_path / "state.json"
    with running(*UP, "--experts", "1", "--tensor-parallel", "3", "--state", str(state_file)) as up:
        listed = started(up, state_file)
        ranks = [(each["index"], each["rank"]) for each in listed if each["role"] == "attention-rank"]
        assert ranks == [(0, 1), (0, 2)]
        with Client(up.address) as client:
            for prompt, ids in goldens.PROMPTS.items():
                done = client.generate(ids, max_tokens=16, temperature=0, ignore_eos=True)
                assert list(done.token_ids) == goldens.greedy("seed", prompt)
            assert client.status().workers[0].device == "cpu x 3"
        pids = [each["pid"] for each in listed]
        assert all(map(is_alive, pids))
        assert up.stop() == 0
        wait_dead(pids, 0.0)
        assert not any("ended with code" in line for line in up.errors)


def test_followers_end_with_everything_else(tmp_path: Path) -> None:
    state_file = tmp_path / "state.json"
    with running(*UP, "--experts", "1", "--tensor-parallel", "2", "--state", str(state_file)) as up:
        pids = [each["pid"] for each in started(up, state_file)]
        up.stop(signal.SIGKILL)
        wait_dead(pids)


NUM_TOKENS = 60

PROMPTS = [*goldens.PROMPTS]


async def generate_all(address: str, strike: Callable[[AsyncClient], Awaitable[None]] | None = None) -> list[list[int]]:
    """The tokens of all prompts at once. strike: called when all of them are under way."""
    under_way = [asyncio.Event() for _ in PROMPTS]
    async with AsyncClient(address) as client:

        async def one(prompt: str, begun: asyncio.Event) -> list[int]:
            tokens: list[int] = []
            ids = goldens.PROMPTS[prompt]
            async for delta in client.stream(ids, max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True):
                tokens += delta.token_ids
                if len(tokens) > 20:
                    begun.set()
            return tokens

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(*each)) for each in zip(PROMPTS, under_way, strict=True)]
            if strike is not None:
                for begun in under_way:
                    await begun.wait()
                await strike(client)
    return [task.result() for task in tasks]


@pytest.mark.parametrize("victim", ["attention", "attention-rank"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_rank_that_is_lost_changes_no_token(tmp_path: Path, victim: str, number: signal.Signals) -> None:
    """Its worker ends as a whole, and its sequences go on at the other one, while requests run."""
    state_file = tmp_path / "state.json"
    flags = ("--experts", "1", "--attention", "2", "--tensor-parallel", "2", "--state", str(state_file))
    with running(*UP, *flags) as up:
        listed = started(up, state_file)
        struck = pid_of(listed, victim, 0)
        expected = asyncio.run(generate_all(up.address))
        for prompt, tokens in zip(PROMPTS, expected, strict=True):
            assert tokens[:16] == goldens.greedy("seed", prompt)

        async def strike(client: AsyncClient) -> None:
            status = await client.status()
            assert all(worker.used_pages for worker in status.workers[:2]), "both workers have sequences"
            os.kill(struck, number)

        assert asyncio.run(generate_all(up.address, strike)) == expected
        pids = [pid_of(listed, role, 0) for role in ("attention", "attention-rank")]
        wait_dead([pid for pid in pids if pid != struck], 5.0 if number is signal.SIGKILL else 90.0)
        if number is signal.SIGSTOP:
            os.kill(struck, signal.SIGCONT)
        wait_dead(pids)
        wait_said(up, "attention 0 ended with code")
        assert asyncio.run(generate_all(up.address)) == expected, "one is left"
        assert up.stop() == 0


def test_a_number_of_ranks_that_cannot_be(tmp_path: Path) -> None:
    with running(*UP, "--tensor-parallel", "4") as up:
        assert up.wait() == 1
        said = "\n".join(up.errors)
        assert "tensor_parallel is 4, must divide the model's 6 query heads: 1, 2, 3, 6 do" in said
        assert "Traceback" not in said
