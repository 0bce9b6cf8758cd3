"""A whole cluster of real processes at fixed addresses, each of which can be hurt and brought back."""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from attention_worker.config import AttentionWorkerSettings
from benchmarks.chaos.network import Cables
from benchmarks.chaos.node import Node
from benchmarks.chaos.proxy import ProxyControl
from expert_worker.config import ExpertWorkerSettings
from grokmoe import AsyncClient, Status, WorkerState
from grokmoe.errors import GrokmoeError
from grokmoe.expert_spec import describe_units
from grokmoe.model_config import ModelConfig
from grokmoe.server import ServerSettings
from grokmoe.settings import to_flags
from launcher.paths import DEMO_MODEL
from launcher.stage_layers import stage_layers
from router.config import RouterSettings
from router.discovery import STAGE_JOINT
from router.placement import spread

STATUS_POLL = 0.02
"""Seconds between two looks at the router's status: the resolution of the time to recover."""

WORKER_PORT = 7100
"""Of every worker that has a namespace of its own."""


@dataclasses.dataclass(frozen=True)
class ClusterPlan:
    """What is started. Every expert is on `replicas` workers; float32, so that a token has one right value.

    attention: attention workers, each a pipeline of `stages` processes, which are the nodes then.
    proxied, in_namespaces, full_disk name roles or single nodes (`expert 0`). proxied: the router reaches them through
    the proxy. in_namespaces: they are in network namespaces of their own. full_disk: they log everything to a disk that
    is full.
    attention_module: what `python -m` runs as an attention worker. max_migrations: the router's.
    tensor_parallel: ranks of each attention worker.
    """

    model: Path = DEMO_MODEL
    attention: int = 2
    stages: int = 1
    experts: int = 4
    replicas: int = 2
    proxied: tuple[str, ...] = ()
    in_namespaces: tuple[str, ...] = ()
    full_disk: tuple[str, ...] = ()
    attention_module: str = "attention_worker"
    max_migrations: int = 5
    tensor_parallel: int = 1


class ChaosCluster:
    """The processes. Use as an async context manager: leaving it ends them all, whatever state they are in."""

    def __init__(self, plan: ClusterPlan) -> None:
        self.plan = plan
        self._folder = Path(tempfile.mkdtemp(prefix="chaos-", dir="/tmp"))  # short: a socket's path is limited
        self.cables = Cables()
        self._routes: dict[str, str] = {}
        self.workers: list[Node] = []
        self.proxy: Node | None = None
        self.control: ProxyControl | None = None
        try:
            self._add_workers()
            self.router = self._router()
            if self._routes:
                self.proxy = self._proxy()
        except BaseException:
            self._remove()
            raise

    def _socket(self, name: str) -> str:
        return f"unix:{self._folder}/{name}"

    def _add_workers(self) -> None:
        plan = self.plan
        common: dict[str, Any] = {"model": str(plan.model), "dtype": "float32"}
        config = ModelConfig.from_file(plan.model)
        for index, layers in enumerate(stage_layers(config.num_layers, plan.stages) * plan.attention):
            attention = AttentionWorkerSettings(
                **common,
                layers=layers,
                page_size=16,
                kv_gib=0.01,
                max_step_tokens=512,
                threads=1,
                tensor_parallel=plan.tensor_parallel,
            )
            self.workers.append(self._worker("attention", index, plan.attention_module, to_flags(attention)))
        for index, held in enumerate(spread(config.num_experts, plan.experts, plan.replicas)):
            experts = ExpertWorkerSettings(**common, experts=describe_units(held), threads=1)
            self.workers.append(self._worker("expert", index, "expert_worker", to_flags(experts)))

    def _worker(self, role: str, index: int, module: str, flags: list[str]) -> Node:
        name = f"{role}-{index}"
        listen, namespace = self._socket(name), ""
        if self._is_among(self.plan.in_namespaces, role, index):
            namespace, host = self.cables.add()
            listen = f"{host}:{WORKER_PORT}"
        address = listen
        if self._is_among(self.plan.proxied, role, index):
            address = self._socket(f"{name}-proxy")
            self._routes[address] = listen
        return self._serving(role, index, module, flags, listen, address, namespace)

    def _serving(
        self, role: str, index: int, module: str, flags: list[str], listen: str, address: str, namespace: str = ""
    ) -> Node:
        is_full = self._is_among(self.plan.full_disk, role, index)
        server = ServerSettings(listen=listen, metrics_port=-1, log_level="debug" if is_full else "info")
        return Node(
            role, index, module, [*flags, *to_flags(server)], address, namespace, "/dev/full" if is_full else ""
        )

    @staticmethod
    def _is_among(names: tuple[str, ...], role: str, index: int) -> bool:
        return role in names or f"{role} {index}" in names

    def _router(self) -> Node:
        addresses = {
            role: tuple(worker.address for worker in self.workers if worker.role == role)
            for role in ("attention", "expert")
        }
        stages = iter(addresses["attention"])
        settings = RouterSettings(
            model=str(self.plan.model),
            dtype="float32",
            attention=tuple(map(STAGE_JOINT.join, zip(*[stages] * self.plan.stages, strict=True))),
            experts=addresses["expert"],
            max_migrations=self.plan.max_migrations,
        )
        address = self._socket("router")
        return self._serving("router", 0, "router", to_flags(settings), address, address)

    def _proxy(self) -> Node:
        control = self._socket("control")
        routes = ",".join(f"{listen}={worker}" for listen, worker in self._routes.items())
        flags = [f"--control={control}", f"--routes={routes}"]
        return Node("proxy", 0, "benchmarks.chaos.proxy", flags, control)

    @property
    def nodes(self) -> list[Node]:
        """Every process, in the order in which they are ended: who calls before who is called."""
        return [self.router, *([self.proxy] if self.proxy else []), *self.workers]

    def of(self, target: str) -> list[Node]:
        """The nodes of a role, the one of a name, or all of them."""
        return [node for node in self.nodes if target in (node.role, node.name, "all")]

    async def __aenter__(self) -> Self:
        try:
            for node in self.nodes:
                await node.spawn()
            await asyncio.gather(*(node.wait_ready() for node in self.nodes))
            if self.proxy is not None:
                self.control = ProxyControl(self.proxy.address)
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop()

    async def _stop(self) -> None:
        if self.control is not None:
            await self.control.close()
        for node in self.nodes[: -len(self.workers)]:
            await node.stop()
        await asyncio.gather(*(worker.stop() for worker in self.workers))
        self._remove()

    def _remove(self) -> None:
        self.cables.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    async def wait_whole(self, client: AsyncClient, timeout: float) -> float | None:
        """Waits until the router uses every worker. Returns when that was seen, monotonic; None: not in time."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            try:
                if is_whole(await client.status()):
                    return time.monotonic()
            except GrokmoeError:
                pass  # the router itself is away
            await asyncio.sleep(STATUS_POLL)
        return None

    def log(self, num_lines: int = 25) -> str:
        """The last words of every process, for the report of a failure."""
        return "\n".join(f"{node.name}: {line}" for node in self.nodes for line in list(node.lines)[-num_lines:])


def is_whole(status: Status) -> bool:
    """Whether every worker is in use."""
    return all(worker.state is WorkerState.READY for worker in status.workers)
