"""`grokmoe up`: the split topology on one host, every role a process, Unix sockets between them."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from attention_worker.config import AttentionWorkerSettings
from attention_worker.sharding import Shard
from expert_worker.config import ExpertWorkerSettings
from expert_worker.expert_dtype import EXPERT_DTYPE_HELP, EXPERT_DTYPES, SAME
from grokmoe.checkpoint import read_config
from grokmoe.errors import ConfigError
from grokmoe.expert_spec import describe_units
from grokmoe.expert_units import check_slicing, expert_of, num_slices_of, units_of
from grokmoe.logs import LogSettings, log_to_stderr, say
from grokmoe.model_config import ModelConfig
from grokmoe.pairs import BACKENDS
from grokmoe.security import SecuritySettings
from grokmoe.server import ServerSettings, check_port, stop_signal
from grokmoe.settings import setting, to_flags
from launcher.openai import DEFAULT_OPENAI_PORT, check_can_start, gateway_process, serve_with
from launcher.paths import DEFAULT_HOST, DEFAULT_PORT, DEMO_MODEL
from launcher.process import RoleProcess
from launcher.stage_layers import stage_layers
from router.config import LimitSettings, RouterSettings, read_placement
from router.discovery import STAGE_JOINT
from router.experts.fitness import most_rows_per_token
from router.placement import spread
from router.transport.pair_offers import GRPC


@dataclasses.dataclass(frozen=True)
class UpSettings(SecuritySettings, LogSettings, LimitSettings):
    """What `grokmoe up` takes. Who may call is said of the router: the workers' sockets are its own user's alone."""

    model: str = setting(str(DEMO_MODEL), "checkpoint directory; default: the embedded demo model", metavar="DIR")
    variant: str = setting("vllm", "which implementation's numerics to follow", choices=("vllm", "xai"))
    dtype: str = setting("bfloat16", "type to compute in", choices=("float32", "bfloat16"))
    expert_dtype: str = setting(SAME, EXPERT_DTYPE_HELP, choices=EXPERT_DTYPES)
    experts: int = setting(2, "expert worker processes", metavar="N")
    attention: int = setting(1, "attention workers, or pipelines of them", metavar="M")
    tensor_parallel: int = setting(1, "ranks of each attention worker, a process each", metavar="T")
    pipeline_stages: int = setting(1, "workers among which the layers are shared out, in each of the M", metavar="S")
    stage_layers: tuple[str, ...] = setting(
        [], "layers of each stage, such as 0-20,21-63; empty: as even as can be", metavar="LAYERS"
    )
    expert_transport: str = setting(
        GRPC,
        "how rows travel to expert workers: in messages, or beside them by gloo or NCCL",
        choices=(GRPC, *BACKENDS),
    )
    expert_replicas: int = setting(1, "workers that hold each expert", metavar="R")
    expert_slices: int = setting(
        1, "cut each expert into so many slices, which workers compute at the same time", metavar="K"
    )
    attention_device: str = setting(
        "cpu", "where attention workers compute: cpu, cuda, cuda:N; {} is the worker's number"
    )
    expert_device: str = setting("cpu", "the same of expert workers: cuda:{} gives every one a card of its own")
    host: str = setting(DEFAULT_HOST, "host the router serves on")
    port: int = setting(DEFAULT_PORT, "port the router serves on; 0: any free one")
    state: str = setting("", "file to write addresses and process ids to, as JSON", metavar="FILE")
    lanes: int = setting(1, "steps in flight per attention worker; in a pipeline at least one for each stage")
    page_size: int = setting(32, "positions per KV page")
    kv_gib: float = setting(1.0, "memory for KV pages of each attention worker in GiB, of each rank if it has several")
    deterministic: bool = setting(False, "the same bits whatever else is computed beside, in bfloat16 too")
    threads: int = setting(0, "threads of each worker or rank; 0: the cores shared out among those of a role")
    placement: str = setting(
        "",
        'which workers hold and serve experts, in this order: a JSON file {"EXPERTS": [worker, ...]}, EXPERTS as 0, '
        "0-3 or 0:1/2; empty: spread evenly",
        metavar="FILE",
    )
    rebalance: str = setting("off", "move experts between workers by itself, to even out their load", ("off", "auto"))
    openai: bool = setting(False, "serve the OpenAI HTTP API too, by a gateway in front of the router")
    openai_port: int = setting(DEFAULT_OPENAI_PORT, "port of the OpenAI HTTP API; 0: any free one")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.openai and not self.is_open:
            raise ConfigError("openai: the gateway has neither TLS nor a token for the server behind it")
        check_port("port", self.port)
        check_port("openai_port", self.openai_port)
        for name in ("attention", "tensor_parallel"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, must be at least 1")
        if self.state and not Path(self.state).resolve().parent.is_dir():
            raise ConfigError(f"state is {self.state}: there is no such folder")


RANK_ROLE = "attention-rank"
"""In the state file: a rank but the first of an attention worker, whose `index` it has."""

MAX_SOCKET_FOLDER = 80
"""Longest folder name that leaves room for a socket's: the path of a Unix socket has at most 107 characters."""

Report = Callable[[str], None]


class Cluster:
    """The processes of one `grokmoe up`. Use as an async context manager: leaving it ends them all."""

    def __init__(self, settings: UpSettings, report: Report = lambda line: None, say: Report | None = None) -> None:
        """report: receives a line per process when it is ready. say: receives what they log, see RoleProcess.

        Raises ConfigError for counts that cannot be.
        """
        self.settings, self._report, self._say = settings, report, say
        self._layers: dict[RoleProcess, str] = {}
        self._directory = Path(tempfile.mkdtemp(prefix="grokmoe-"))
        if len(str(self._directory)) > MAX_SOCKET_FOLDER:
            self._directory.rmdir()
            self._directory = Path(tempfile.mkdtemp(prefix="grokmoe-", dir="/tmp"))
        try:
            self.workers, self.router = self._plan()
        except BaseException:
            shutil.rmtree(self._directory, ignore_errors=True)
            raise

    def _plan(self) -> tuple[list[RoleProcess], RoleProcess]:
        s = self.settings
        config = read_config(Path(s.model))[1]
        Shard.of(config, 0, s.tensor_parallel)  # whether the heads can be shared out so
        common = {"model": str(Path(s.model).resolve()), "variant": s.variant, "dtype": s.dtype}
        worker = {**common, "deterministic": s.deterministic, "traces": s.traces}
        workers = []
        sizes = {"page_size": s.page_size, "kv_gib": s.kv_gib, "max_step_tokens": s.max_step_tokens}
        stages = stage_layers(config.num_layers, s.pipeline_stages, s.stage_layers)
        threads = s.threads or _share(s.attention * len(stages) * s.tensor_parallel)
        for index, layers in enumerate(stages * s.attention):
            attention = AttentionWorkerSettings(
                **worker,
                **sizes,
                layers=layers,
                threads=threads,
                tensor_parallel=s.tensor_parallel,
                device=s.attention_device.format(index),
            )
            flags = [*to_flags(attention), *self._serve_flags("attention", index)]
            workers.append(RoleProcess("attention", index, "attention_worker", flags, self._say))
            self._layers[workers[-1]] = layers
        for index, held in enumerate(_held(s, config)):
            most_rows = s.max_step_tokens * most_rows_per_token(held, config.experts_per_token)
            experts = ExpertWorkerSettings(
                **worker,
                expert_dtype=s.expert_dtype,
                experts=describe_units(held),
                device=s.expert_device.format(index),
                threads=s.threads or _share(s.experts),
                max_rows=max(ExpertWorkerSettings.max_rows, most_rows),
            )
            flags = [*to_flags(experts), *self._serve_flags("expert", index)]
            workers.append(RoleProcess("expert", index, "expert_worker", flags, self._say))
        router = RouterSettings(
            **common,
            placement=str(Path(s.placement).resolve()) if s.placement else "",
            attention=tuple(
                STAGE_JOINT.join(self._socket("attention", first + number) for number in range(len(stages)))
                for first in range(0, s.attention * len(stages), len(stages))
            ),
            experts=tuple(self._socket("expert", index) for index in range(s.experts)),
            lanes=s.lanes,
            rebalance=s.rebalance,
            expert_transport=s.expert_transport,
            **s.limits(),
        )
        server = ServerSettings(listen=f"{s.host}:{s.port}", **s.logs(), **s.security())
        flags = [*to_flags(router), *to_flags(server)]
        return workers, RoleProcess("router", 0, "router", flags, self._say)

    def _socket(self, role: str, index: int) -> str:
        return f"unix:{self._directory}/{role}-{index}.sock"

    def _serve_flags(self, role: str, index: int) -> list[str]:
        return to_flags(ServerSettings(listen=self._socket(role, index), **self.settings.logs()))

    @property
    def processes(self) -> list[RoleProcess]:
        """All children, the router first."""
        return [self.router, *self.workers]

    @property
    def address(self) -> str:
        """Where clients connect."""
        return self.router.address

    async def __aenter__(self) -> Cluster:
        await self.start()
        return self

    async def start(self) -> None:
        """Starts all processes and waits until each is ready. Raises StartupError with a child's own words."""
        try:
            for process in self.processes:
                await process.start()
            async with asyncio.TaskGroup() as group:
                for process in self.processes:
                    group.create_task(self._wait_ready(process))
        except BaseException as error:
            await self.stop()
            if isinstance(error, BaseExceptionGroup):
                # The router's complaint about a worker that is missing is a consequence, not the cause.
                raise error.exceptions[0] from None
            raise
        if self.settings.state:
            self._write_state(Path(self.settings.state))

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def _wait_ready(self, process: RoleProcess) -> None:
        await process.wait_ready()
        ranks = "".join(f", rank {rank} pid {pid}" for rank, pid in process.rank_pids.items())
        self._report(f"{process.name} ready: pid {process.pid}{ranks}, {process.address}, metrics {process.metrics}")

    def _write_state(self, path: Path) -> None:
        listed: list[dict[str, str | int]] = []
        for process in self.processes:
            of = {"index": process.index, "address": process.address, "metrics": process.metrics}
            layers = {"layers": self._layers[process]} if process in self._layers else {}
            listed.append({"role": process.role, "pid": process.pid, **of, **layers})
            # The worker's first rank is the worker's process; the others have no address.
            listed += [
                {"role": RANK_ROLE, "pid": pid, "index": process.index, "rank": rank}
                for rank, pid in process.rank_pids.items()
            ]
        # Written beside and renamed: whoever waits for the file never reads half of it.
        beside = path.with_name(path.name + ".part")
        beside.write_text(json.dumps({"address": self.address, "processes": listed}, indent=1) + "\n")
        os.replace(beside, path)

    async def stop(self) -> None:
        """Ends the router first, so that it does not mourn its workers."""
        await self.router.stop()
        await asyncio.gather(*(worker.stop() for worker in self.workers))
        shutil.rmtree(self._directory, ignore_errors=True)


def _held(settings: UpSettings, config: ModelConfig) -> tuple[tuple[int, ...], ...]:
    """The units of each worker. Raises ConfigError for a placement that leaves an expert or a worker out, and for
    slices that cannot be."""
    num_experts, num_slices = config.num_experts, settings.expert_slices
    check_slicing("expert_slices", num_slices, config.intermediate_size)
    table = read_placement(settings.placement, num_experts)
    if table is None:
        return spread(num_experts, settings.experts, settings.expert_replicas, num_slices)
    if num_slices > 1:
        raise ConfigError(f"expert_slices is {num_slices}, but placement {settings.placement} says how experts are cut")
    cut = {expert_of(unit): num_slices_of(unit) for unit in table}
    if set(table) != {unit for expert in range(num_experts) for unit in units_of(expert, cut.get(expert, 1))}:
        raise ConfigError(
            f"placement {settings.placement}: must name experts 0 to {num_experts - 1}, each whole or all of its slices"
        )
    for num_slices in cut.values():
        check_slicing(f"placement {settings.placement}: a number of slices", num_slices, config.intermediate_size)
    named = {worker for workers in table.values() for worker in workers}
    if named != set(range(settings.experts)) or not all(table.values()):
        raise ConfigError(
            f"placement {settings.placement}: every expert needs a worker, and workers 0 to {settings.experts - 1} "
            "an expert"
        )
    return tuple(
        tuple(sorted(unit for unit, workers in table.items() if worker in workers))
        for worker in range(settings.experts)
    )


def _share(num_workers: int) -> int:
    """Threads for each of the workers of one role. While one role computes the others mostly wait."""
    return max(1, (os.cpu_count() or 1) // max(1, num_workers))


async def up(settings: UpSettings) -> int:
    """Runs the cluster until a signal comes or its router ends. Returns the exit code. Raises StartupError."""
    if settings.openai:
        check_can_start(settings.model)
    log_to_stderr(settings, "up")
    stop = stop_signal()

    cluster = Cluster(settings, lambda line: print(line, flush=True))
    stopping = asyncio.ensure_future(stop.wait())
    try:
        starting = asyncio.ensure_future(cluster.start())
        await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            return 0
        await starting
        print(f"READY {cluster.address}", flush=True)
        if not settings.openai:
            return await _watch(cluster, stopping)
        gateway = gateway_process(
            cluster.address, settings.model, settings.host, settings.openai_port, settings, settings.traces
        )
        return await serve_with(gateway, _watch(cluster, stopping))
    finally:
        stopping.cancel()
        await cluster.stop()


async def _watch(cluster: Cluster, stopping: asyncio.Future[bool]) -> int:
    """Reports children that end. Returns when a signal came (0) or the router has ended (1)."""
    ends = {asyncio.ensure_future(process.wait_ended()): process for process in cluster.processes}
    try:
        while True:
            done, _ = await asyncio.wait((stopping, *ends), return_when=asyncio.FIRST_COMPLETED)
            if stopping in done:
                return 0
            for process in [ends.pop(task) for task in done if task in ends]:
                say(f"{process.name} ended with code {process.returncode}")
                if process is cluster.router:
                    return 1
    finally:
        for task in ends:
            task.cancel()
