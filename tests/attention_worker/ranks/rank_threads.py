"""The ranks of one attention worker as threads of this process: real engines, real gloo, no start of processes."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import datetime
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from attention_worker.engine import AttentionEngine, AttentionEngineSettings, MoeInput, StepRun
from attention_worker.ranks.follower import Follower
from attention_worker.ranks.leader import Leader
from attention_worker.ranks.orders import Orders
from attention_worker.sharding import Shard
from attention_worker.sharding.messages import DeviceMessages, HostMessages, Messages
from attention_worker.sharding.ranks import Ranks
from attention_worker.weights import load_weights
from grokmoe.checkpoint import Checkpoint
from grokmoe.device_thread import DeviceThread
from grokmoe.step_plan import SequenceChunk, StepPlan, StepResult
from grokmoe.telemetry import AttentionMetrics, new_registry

TIMEOUT = 30.0

CPU = torch.device("cpu")


def gloo(rank: int, size: int, store: dist.Store) -> dist.ProcessGroupGloo:
    """One rank's end, over loopback."""
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._timeout = datetime.timedelta(seconds=TIMEOUT)
    return dist.ProcessGroupGloo(store, rank, size, options)


def on_all(size: int, act: Callable[[Messages], object], by_collectives: bool = False) -> list[object]:
    """What `act` gives on each of so many ranks."""
    store = dist.HashStore()

    def rank_of(rank: int) -> object:
        group = gloo(rank, size, store)
        return act(DeviceMessages(group, TIMEOUT) if by_collectives else HostMessages(group, TIMEOUT))

    with concurrent.futures.ThreadPoolExecutor(size) as pool:
        return [future.result(TIMEOUT) for future in [pool.submit(rank_of, rank) for rank in range(size)]]


def wait_until(is_so: Callable[[], bool]) -> None:
    """Fails when it does not become so."""
    deadline = time.monotonic() + TIMEOUT
    while not is_so():
        assert time.monotonic() < deadline, "it never came to be so"
        time.sleep(0.01)


@dataclasses.dataclass
class RankThreads:
    """A worker whose ranks are threads.

    engines, devices: of all ranks, the leader's first. failures, leaves: what the leader has reported.
    """

    engines: list[AttentionEngine]
    devices: list[DeviceThread]
    leader: Leader
    followers: list[Follower]
    failures: list[str]
    leaves: list[None]
    fill: Callable[[MoeInput], torch.Tensor]
    following: list[concurrent.futures.Future[None]]

    @property
    def engine(self) -> AttentionEngine:
        """The leader's."""
        return self.engines[0]

    def advance(self, run: StepRun, moe_TD: torch.Tensor | None) -> MoeInput | StepResult:
        """On the leader's device thread."""
        return self.devices[0].call(run.advance, moe_TD)

    def finish(self, run: StepRun) -> StepResult:
        """Drives a run that has not begun to its end."""
        at = self.advance(run, None)
        while isinstance(at, MoeInput):
            at = self.advance(run, self.fill(at))
        return at

    def begin(self, *chunks: SequenceChunk) -> StepRun:
        """A run of a plan of these chunks."""
        return self.engine.begin(StepPlan(self.engine.incarnation, chunks))

    def step(self, *chunks: SequenceChunk) -> StepResult:
        """A whole step."""
        return self.finish(self.begin(*chunks))


@contextlib.contextmanager
def rank_threads(
    size: int,
    model: Path,
    fill: Callable[[MoeInput], torch.Tensor],
    dtype: torch.dtype = torch.float32,
    sizes: AttentionEngineSettings = AttentionEngineSettings(num_pages=64, page_size=8, max_step_tokens=512),  # noqa: B008
    deterministic: bool = False,
    held: range | None = None,
    timeout: float = TIMEOUT,
) -> Iterator[RankThreads]:
    """A worker that serves. fill: the MoE."""
    store = dist.HashStore()
    failures: list[str] = []
    leaves: list[None] = []
    devices = [DeviceThread(f"rank-{rank}") for rank in range(size)]
    made: dict[int, tuple[AttentionEngine, Leader | Follower]] = {}

    def make(rank: int) -> None:
        torch.set_num_threads(1)
        with Checkpoint.open(model) as checkpoint:
            config, shard = checkpoint.config, Shard.of(checkpoint.config, rank, size)
            weights = load_weights(checkpoint, dtype, CPU, deterministic, held, shard)
        host = HostMessages(gloo(rank, size, store), TIMEOUT)
        orders, ranks = Orders(host, host, CPU), Ranks(host, shard, config.vocab_size)
        metrics = AttentionMetrics(new_registry())
        if rank:
            engine = AttentionEngine(config, weights, sizes, metrics, devices[rank], ranks)
            made[rank] = engine, Follower(orders, engine.forward, config.hidden_size, timeout)
        else:
            leader = Leader(orders, devices[0], failures.append, lambda: leaves.append(None))
            engine = AttentionEngine(config, weights, sizes, metrics, devices[0], ranks, leader.lead)
            made[rank] = engine, leader

    with concurrent.futures.ThreadPoolExecutor(size) as pool:
        list(pool.map(lambda rank: devices[rank].call(make, rank), range(size)))
    engines = [made[rank][0] for rank in range(size)]
    leader, followers = made[0][1], [made[rank][1] for rank in range(1, size)]
    assert isinstance(leader, Leader)
    pool = concurrent.futures.ThreadPoolExecutor(size)
    following = [
        pool.submit(devices[rank].call, follower.follow)  # type: ignore[union-attr]
        for rank, follower in enumerate(followers, 1)
    ]
    devices[0].call(leader.serve, timeout)
    try:
        yield RankThreads(engines, devices, leader, followers, failures, leaves, fill, following)  # type: ignore[arg-type]
        if not failures:
            leader.end()
            for future in following:
                future.result(TIMEOUT)
    finally:
        concurrent.futures.wait(following, TIMEOUT)
        for device in devices:
            device.stop()
        pool.shutdown()
