"""The topologies of docs/architecture.md as engines for tests: same code as in production, workers where the test says.

`fused`: function calls only. `split`: every worker behind a real gRPC server on a Unix socket, in this process.
`fused_remote`: attention by function calls, experts as in `split`. `processes`: every worker a process of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import torch

from attention_worker.config import ALL, AttentionWorkerSettings
from attention_worker.loading import load_engine as load_attention
from attention_worker.service import AttentionService
from expert_worker import weights as expert_weights
from expert_worker.config import ExpertWorkerSettings
from expert_worker.engine import ExpertEngine
from expert_worker.experts import ExpertSet
from expert_worker.service import ExpertService
from grokmoe.checkpoint import Checkpoint, read_config
from grokmoe.device_thread import DeviceThread
from grokmoe.expert_spec import describe_units, parse_experts
from grokmoe.server import RoleServer, ServerSettings
from grokmoe.settings import to_flags
from grokmoe.telemetry import AttentionMetrics, ExpertMetrics, RouterMetrics, new_registry
from launcher.process import RoleProcess
from launcher.serve import ServeSettings, describe, load_experts
from router.config import RouterSettings
from router.discovery import STAGE_JOINT
from router.engine import Engine
from router.loading import build_engine, load_model
from router.placement import spread
from router.request import Request
from router.transport.base import AttentionLink
from router.transport.grpc_attention import attention_link
from router.transport.local import LocalAttentionLink
from router.transport.pair_expert import expert_links
from router.transport.pipeline import PipelineLink
from router.transport.worker_access import PLAIN

_NUMBERS = itertools.count()


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a topology serves and how. tensor_parallel: for `processes` alone."""

    model: Path
    dtype: str = "float32"
    variant: str = "vllm"
    page_size: int = 16
    num_pages: int = 0
    max_step_tokens: int = 512
    max_running: int = 256
    lanes: int = 1
    min_lane_rows: int = 1
    num_experts: int = 2
    num_attention: int = 1
    stage_layers: tuple[str, ...] = (ALL,)
    expert_replicas: int = 1
    expert_transport: str = "grpc"
    expert_slices: int = 1
    held: tuple[str, ...] = ()
    """What each expert worker holds, in the words of --experts; empty: spread evenly over `num_experts` of them."""
    expert_dtype: str = "same"
    deterministic: bool = False
    tensor_parallel: int = 1

    @property
    def common(self) -> dict[str, str]:
        """The settings that all roles share."""
        return {"model": str(self.model), "dtype": self.dtype, "variant": self.variant}

    @property
    def router(self) -> RouterSettings:
        """Settings of the router, without addresses."""
        return RouterSettings(
            **self.common,
            lanes=self.lanes,
            min_lane_rows=self.min_lane_rows,
            max_step_tokens=self.max_step_tokens,
            max_running=self.max_running,
            expert_transport=self.expert_transport,
        )

    @property
    def attention(self) -> AttentionWorkerSettings:
        """Settings of an attention worker."""
        return AttentionWorkerSettings(
            **self.common,
            page_size=self.page_size,
            num_pages=self.num_pages,
            kv_gib=0.001,
            threads=1,
            deterministic=self.deterministic,
            tensor_parallel=self.tensor_parallel,
        )

    @property
    def stages(self) -> list[AttentionWorkerSettings]:
        """Settings of the stages of a pipeline; of the attention worker where it has all layers."""
        return [dataclasses.replace(self.attention, layers=layers) for layers in self.stage_layers]


@contextlib.asynccontextmanager
async def fused(setup: Setup) -> AsyncIterator[Engine]:
    """All roles by function calls."""
    device = DeviceThread()
    stages = [load_attention(stage, AttentionMetrics(new_registry()), device) for stage in setup.stages]
    serve = ServeSettings(**setup.common, deterministic=setup.deterministic, expert_dtype=setup.expert_dtype)
    experts = load_experts(serve, device, ExpertMetrics(new_registry()))
    link = _join([LocalAttentionLink(stage, describe(stage)) for stage in stages])
    engine = build_engine(load_model(setup.router), setup.router, [link], RouterMetrics(new_registry()), experts)
    async with _running(engine):
        yield engine
    device.stop()


def _join(stages: list[AttentionLink]) -> AttentionLink:
    return stages[0] if len(stages) == 1 else PipelineLink(stages)


@contextlib.asynccontextmanager
async def fused_remote(setup: Setup) -> AsyncIterator[Engine]:
    """Attention by function calls, experts behind gRPC on Unix sockets."""
    attention = load_attention(setup.attention, AttentionMetrics(new_registry()), DeviceThread())
    link = LocalAttentionLink(attention, describe(attention))
    async with _expert_servers(setup) as addresses, _running(_engine(setup, [link], addresses)) as engine:
        yield engine
    attention.device.stop()


@contextlib.asynccontextmanager
async def split(setup: Setup) -> AsyncIterator[Engine]:
    """Workers behind gRPC on Unix sockets, all in this process."""
    servers, devices = [], []
    with tempfile.TemporaryDirectory() as directory:
        try:
            links = []
            for index in range(setup.num_attention):
                addresses = []
                for number, stage in enumerate(setup.stages):
                    device = DeviceThread()
                    devices.append(device)
                    engine = load_attention(stage, AttentionMetrics(new_registry()), device)
                    server = RoleServer([AttentionService(engine).as_service()])
                    addresses.append(await server.start(f"unix:{directory}/a{index}-{number}"))
                    servers.append(server)
                links.append(attention_link(STAGE_JOINT.join(addresses)))
            async with _expert_servers(setup) as addresses, _running(_engine(setup, links, addresses)) as engine:
                yield engine
        finally:
            for server in servers:
                await server.stop(0)
            for device in devices:
                device.stop()


@contextlib.asynccontextmanager
async def _expert_servers(setup: Setup) -> AsyncIterator[list[str]]:
    """Their addresses."""
    servers, devices, addresses = [], [], []
    with tempfile.TemporaryDirectory() as directory:
        try:
            for index, held in enumerate(specs(setup)):
                device = DeviceThread()
                devices.append(device)
                server = RoleServer([_expert_service(setup, held, device).as_service()])
                servers.append(server)
                addresses.append(await server.start(f"unix:{directory}/e{index}"))
            yield addresses
        finally:
            for server in servers:
                await server.stop(0)
            for device in devices:
                device.stop()


def _expert_service(setup: Setup, held: str, device: DeviceThread) -> ExpertService:
    with Checkpoint.open(setup.model, setup.variant) as checkpoint:
        config = checkpoint.config
        table = parse_experts(held, config.num_experts, config.num_layers)
        dtype = getattr(torch, setup.dtype)
        experts = ExpertSet(
            config, table, dtype, torch.device("cpu"), setup.deterministic, expert_dtype=setup.expert_dtype
        )
        device.call(expert_weights.load, experts, checkpoint)
    metrics = ExpertMetrics(new_registry())
    return ExpertService(ExpertEngine(experts, metrics, device), metrics, 8192, lambda: True)


@contextlib.asynccontextmanager
async def processes(setup: Setup) -> AsyncIterator[Engine]:
    """Workers as processes of their own; the engine is in this one."""
    with tempfile.TemporaryDirectory() as directory:
        started = []
        for index, stage in enumerate(setup.stages * setup.num_attention):
            flags = [*to_flags(stage), *to_flags(ServerSettings(listen=f"unix:{directory}/a{index}"))]
            started.append(RoleProcess("attention", index, "attention_worker", flags))
        for index, held in enumerate(specs(setup)):
            experts = ExpertWorkerSettings(**setup.common, experts=held, threads=1)
            flags = [*to_flags(experts), *to_flags(ServerSettings(listen=f"unix:{directory}/e{index}"))]
            started.append(RoleProcess("expert", index, "expert_worker", flags))
        try:
            for process in started:
                await process.start()
            for process in started:
                await process.wait_ready()
            attention = iter([process.address for process in started if process.role == "attention"])
            by_pipeline = zip(*[attention] * len(setup.stages), strict=True)
            engine = _engine(
                setup,
                [attention_link(STAGE_JOINT.join(stages)) for stages in by_pipeline],
                [process.address for process in started if process.role == "expert"],
            )
            async with _running(engine):
                yield engine
        finally:
            for process in started:
                await process.stop()


def specs(setup: Setup) -> tuple[str, ...]:
    """What each expert worker holds."""
    if setup.held:
        return setup.held
    num_experts = read_config(Path(setup.model))[1].num_experts
    units_W = spread(num_experts, setup.num_experts, setup.expert_replicas, setup.expert_slices)
    return tuple(map(describe_units, units_W))


def _engine(setup: Setup, attention: Sequence[AttentionLink], experts: Sequence[str]) -> Engine:
    metrics = RouterMetrics(new_registry())
    expert_link = expert_links(setup.router, PLAIN, metrics)
    return build_engine(load_model(setup.router), setup.router, attention, metrics, [expert_link(e) for e in experts])


@contextlib.asynccontextmanager
async def _running(engine: Engine) -> AsyncIterator[Engine]:
    await engine.start()
    try:
        yield engine
        engine.check()
    finally:
        await engine.close()


async def greedy(engine: Engine, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """The most likely continuation."""
    return (await run(engine, request(prompt, num_tokens)))[0]


def request(prompt: Sequence[int], num_tokens: int, logits: bool = False) -> Request:
    """A greedy request that only its length ends."""
    from router.request import SamplingSettings

    return Request(
        request_id=f"test-{next(_NUMBERS)}",
        prompt_ids=tuple(prompt),
        sampling=SamplingSettings(temperature=0),
        max_tokens=num_tokens,
        logits=logits,
    )


async def run(engine: Engine, what: Request) -> tuple[list[int], torch.Tensor | None]:
    """Tokens, and the logits of all positions when the request asks for them."""
    generation = engine.submit(what)
    tokens: list[int] = []
    reason = None
    try:
        while reason is None:
            (delivery,) = await generation.take()
            tokens += delivery.token_ids
            reason = delivery.finish_reason
    finally:
        engine.cancel(generation)
    parts = generation.logits()
    return tokens, torch.cat([part for _, part in parts]) if parts else None
