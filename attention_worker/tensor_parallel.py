"""A worker of several ranks, from its settings: how the leader and its followers come to be, and end."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import torch

from attention_worker.config import AttentionWorkerSettings
from attention_worker.engine import AttentionEngine
from attention_worker.loading import load_part
from attention_worker.ranks.ending import end_process
from attention_worker.ranks.follower import Follower
from attention_worker.ranks.leader import Leader
from attention_worker.ranks.meeting import Meeting
from attention_worker.ranks.processes import RankProcesses
from attention_worker.sharding import Shard
from attention_worker.sharding.messages import RankLost
from attention_worker.sharding.ranks import Ranks
from grokmoe.checkpoint import read_config
from grokmoe.device_thread import DeviceThread
from grokmoe.errors import ConfigError
from grokmoe.server import ServerSettings, stop_signal
from grokmoe.settings import to_flags
from grokmoe.telemetry import AttentionMetrics, new_registry

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"

LEAVE_TIMEOUT = 120.0
"""Seconds that a follower which was asked to end waits for the worker to end in order."""


@contextlib.contextmanager
def leading(
    settings: AttentionWorkerSettings, server: ServerSettings, metrics: AttentionMetrics, device: DeviceThread
) -> Iterator[AttentionEngine]:
    """The engine of rank 0, all ranks loaded and ready; they end when it is left. Raises StartupError.

    Any rank that is lost from now on ends this process.
    """
    if not settings.model:
        raise ConfigError("model is missing: the directory of a checkpoint")
    if settings.lora or settings.lora_root:
        raise ConfigError("lora: a worker of several ranks takes no adapters")
    # Before there is anything to end.
    Shard.of(read_config(Path(settings.model), settings.variant)[1], 0, settings.tensor_parallel)
    with contextlib.ExitStack() as stack:
        if settings.rendezvous:
            meeting = Meeting(0, settings.tensor_parallel, *settings.rendezvous_host_port)
        else:
            meeting = Meeting(0, settings.tensor_parallel, LOOPBACK, 0)
            shares = [_on_one_host(settings, rank, meeting.address) for rank in range(settings.tensor_parallel)]
            settings = shares[0]
            quiet = dataclasses.replace(server, metrics_port=-1, exit_on_stdin_eof=True)
            flags = {rank: [*to_flags(shares[rank]), *to_flags(quiet)] for rank in range(1, len(shares))}
            processes = RankProcesses(flags, end_process)
            stack.callback(processes.end)
            for rank, pid in processes.pids.items():
                print(f"RANK {rank} {pid}", flush=True)  # noqa: T201 - read by whoever started this process
        torch.set_num_threads(1)  # see load_engine
        engine, leader = device.call(_load_leader, settings, metrics, device, meeting)
        stack.callback(leader.end)
        logger.info("%d ranks serve as one worker", settings.tensor_parallel)
        yield engine


def _on_one_host(settings: AttentionWorkerSettings, rank: int, address: str) -> AttentionWorkerSettings:
    """The settings of a rank among others on this host: its share of the cores, or a GPU of its own."""
    threads = settings.threads or max(1, torch.get_num_threads() // settings.tensor_parallel)
    kind, _, first = settings.device.partition(":")
    device = f"{kind}:{int(first or 0) + rank}" if kind == "cuda" else settings.device
    return dataclasses.replace(settings, rank=rank, rendezvous=address, threads=threads, device=device)


def _load_leader(
    settings: AttentionWorkerSettings, metrics: AttentionMetrics, device: DeviceThread, meeting: Meeting
) -> tuple[AttentionEngine, Leader]:
    torch.set_num_threads(settings.threads or torch.get_num_threads())
    config, weights, sizes = load_part(settings, meeting)
    orders = meeting.connect(weights.device)
    leader = Leader(orders, device, end_process, lambda: os.kill(os.getpid(), signal.SIGTERM))
    ranks = Ranks(orders.device, weights.shard, config.vocab_size)
    engine = AttentionEngine(config, weights, sizes, metrics, device, ranks, leader.lead)
    engine.warm_up()
    leader.serve(settings.rank_timeout)
    return engine, leader


async def follow(settings: AttentionWorkerSettings, server: ServerSettings) -> None:
    """Does what rank 0 does until it says that the worker ends. Raises StartupError.

    Asked to end by itself it has rank 0 end the worker in order. When rank 0 is lost this process ends, too.
    """
    stopping = asyncio.ensure_future(stop_signal(server.exit_on_stdin_eof).wait())
    device = DeviceThread("attention-device")
    num_threads = settings.threads or torch.get_num_threads()
    torch.set_num_threads(1)
    loading = device.run(_load_follower, settings, device, num_threads)
    await asyncio.wait((loading, stopping), return_when=asyncio.FIRST_COMPLETED)
    if not loading.done():
        end_process(f"rank {settings.rank} was asked to end before the worker was ready")
    follower = await loading
    following = device.run(follower.follow)
    await asyncio.wait((following, stopping), return_when=asyncio.FIRST_COMPLETED)
    if not following.done():
        follower.leaving.set()
        await asyncio.wait((following,), timeout=LEAVE_TIMEOUT)
        if not following.done():
            end_process(f"rank {settings.rank} was asked to end, and the worker did not end in {LEAVE_TIMEOUT:g} s")
    try:
        await following
    except RankLost as error:
        end_process(f"rank {settings.rank} has lost another: {error}")
    logger.info("rank %d ends with its worker", settings.rank)


def _load_follower(settings: AttentionWorkerSettings, device: DeviceThread, num_threads: int) -> Follower:
    torch.set_num_threads(num_threads)
    meeting = Meeting(settings.rank, settings.tensor_parallel, *settings.rendezvous_host_port)
    config, weights, sizes = load_part(settings, meeting)
    orders = meeting.connect(weights.device)
    ranks = Ranks(orders.device, weights.shard, config.vocab_size)
    engine = AttentionEngine(config, weights, sizes, AttentionMetrics(new_registry()), device, ranks)
    return Follower(orders, engine.forward, config.hidden_size, settings.rank_timeout)
