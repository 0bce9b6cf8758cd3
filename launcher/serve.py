"""`grokmoe serve`: router, attention and experts in one process. Nothing on the way of a token but function calls.

With `--experts` the experts are elsewhere: workers behind gRPC or NCCL, which several such processes may share.
"""

from __future__ import annotations

import dataclasses

import torch

from attention_worker.config import AttentionWorkerSettings
from attention_worker.engine import AttentionEngine
from attention_worker.loading import load_engine as load_attention
from expert_worker import weights as expert_weights
from expert_worker.engine import ExpertEngine
from expert_worker.expert_dtype import EXPERT_DTYPE_HELP, EXPERT_DTYPES, SAME
from expert_worker.experts import ExpertSet
from grokmoe.checkpoint import Checkpoint
from grokmoe.device_thread import DeviceThread
from grokmoe.errors import ConfigError
from grokmoe.expert_spec import ALL, parse_experts
from grokmoe.logs import LogSettings, log_to_stderr, say
from grokmoe.security import SecuritySettings
from grokmoe.server import ServerSettings, check_port, run
from grokmoe.settings import setting
from grokmoe.telemetry import AttentionMetrics, ExpertMetrics, RouterMetrics, new_registry
from launcher.openai import DEFAULT_OPENAI_PORT, check_can_start, free_port, gateway_process, serve_with
from launcher.paths import DEFAULT_HOST, DEFAULT_PORT, DEMO_MODEL
from router.config import LimitSettings, RemoteExpertSettings, RouterSettings
from router.discovery import Sources
from router.loading import build_engine, build_services, expose, load_model
from router.membership import Membership
from router.moe import LocalExperts
from router.status_page import status_pages
from router.transport.base import AttentionInfo, ExpertLink
from router.transport.local import LocalAttentionLink
from router.transport.pair_expert import expert_links
from router.transport.worker_access import WorkerAccess


@dataclasses.dataclass(frozen=True)
class ServeSettings(SecuritySettings, LogSettings, RemoteExpertSettings, LimitSettings):
    """What `grokmoe serve` takes."""

    model: str = setting(str(DEMO_MODEL), "checkpoint directory; default: the embedded demo model", metavar="DIR")
    variant: str = setting("vllm", "which implementation's numerics to follow", choices=("vllm", "xai"))
    dtype: str = setting("bfloat16", "type to compute in", choices=("float32", "bfloat16"))
    expert_dtype: str = setting(SAME, EXPERT_DTYPE_HELP, choices=EXPERT_DTYPES)
    device: str = setting("cpu", "where to compute: cpu, cuda or cuda:N")
    host: str = setting(DEFAULT_HOST, "host to serve on")
    port: int = setting(DEFAULT_PORT, "port to serve on; 0: any free one")
    metrics_port: int = setting(0, "port of the Prometheus endpoint; 0: any free one, -1: none")
    threads: int = setting(0, "threads of one operation; 0: torch's choice")
    page_size: int = setting(32, "positions per KV page")
    kv_gib: float = setting(1.0, "memory for KV pages in GiB")
    deterministic: bool = setting(False, "the same bits whatever else is computed beside, in bfloat16 too")
    enforce_eager: bool = setting(False, "compute every decode step loop by loop, none as a recorded program")
    openai: bool = setting(False, "serve the OpenAI HTTP API too, by a gateway in a process of its own")
    openai_port: int = setting(DEFAULT_OPENAI_PORT, "port of the OpenAI HTTP API; 0: any free one")
    exit_on_stdin_eof: bool = setting(False, "end when standard input closes, so that no child outlives its parent")

    def __post_init__(self) -> None:
        super().__post_init__()
        RemoteExpertSettings.__post_init__(self)
        if self.openai and not self.is_open:
            raise ConfigError("openai: the gateway has neither TLS nor a token for the server behind it")
        check_port("port", self.port)
        check_port("openai_port", self.openai_port)


def describe(engine: AttentionEngine) -> AttentionInfo:
    """What an attention worker would say of itself over the wire."""
    return AttentionInfo(
        config_hash=engine.config.content_hash,
        incarnation=engine.incarnation,
        dtype=engine.dtype,
        hidden_size=engine.config.hidden_size,
        layer_begin=engine.held.start,
        layer_end=engine.held.stop,
        num_pages=engine.settings.num_pages,
        page_size=engine.settings.page_size,
        max_step_tokens=engine.settings.max_step_tokens,
        device=str(engine.torch_device),
    )


class ExpertsOnBoard:
    """The experts of this process as the router calls them, where their loops can be recorded."""

    def __init__(self, engine: ExpertEngine) -> None:
        self._engine, self.record = engine, engine.record

    def __call__(
        self, layer: int, expert_ids: tuple[int, ...], counts: tuple[int, ...], rows_ND: torch.Tensor
    ) -> torch.Tensor:
        """See LocalExperts."""
        return self._engine.forward(layer, expert_ids, counts, rows_ND).rows_ND


def load_experts(settings: ServeSettings, device: DeviceThread, metrics: ExpertMetrics) -> LocalExperts:
    """All experts of the model, to be called on the device thread, which also packs them."""
    with Checkpoint.open(settings.model, settings.variant) as checkpoint:
        config = checkpoint.config
        held = parse_experts(ALL, config.num_experts, config.num_layers)
        dtype = getattr(torch, settings.dtype)
        experts = ExpertSet(
            config,
            held,
            dtype,
            torch.device(settings.device),
            settings.deterministic,
            expert_dtype=settings.expert_dtype,
        )
        device.call(expert_weights.load, experts, checkpoint)
    engine = ExpertEngine(experts, metrics, device)
    if engine.can_be_recorded:
        return ExpertsOnBoard(engine)
    return lambda layer, expert_ids, counts, rows_ND: engine.forward(layer, expert_ids, counts, rows_ND).rows_ND


async def serve(settings: ServeSettings) -> None:
    """Loads the model and serves until a signal comes. Raises StartupError."""
    log_to_stderr(settings, "serve")
    port = settings.port
    if settings.experts and settings.expert_dtype != SAME:
        raise ConfigError(f"expert_dtype is {settings.expert_dtype}: expert workers have their own")
    if settings.openai:
        check_can_start(settings.model)
        port = port or free_port(settings.host)  # the gateway must know it
    num_threads = settings.threads or torch.get_num_threads()
    torch.set_num_threads(1)  # this thread's; the device thread has the team (attention_worker/loading.py)
    registry = new_registry()
    common = {"model": settings.model, "variant": settings.variant, "dtype": settings.dtype}
    router = RouterSettings(**common, **settings.limits(), **settings.remote_experts())
    model, metrics = load_model(router), RouterMetrics(registry)
    expert_link = expert_links(router, WorkerAccess(router), metrics)
    sources = Sources(settings.experts)
    addresses = await sources.first(settings.join_timeout)
    attention = load_attention(
        AttentionWorkerSettings(
            **common,
            device=settings.device,
            threads=num_threads,
            page_size=settings.page_size,
            kv_gib=settings.kv_gib,
            max_step_tokens=settings.max_step_tokens,
            deterministic=settings.deterministic,
        ),
        AttentionMetrics(registry),
        DeviceThread(),
        settings.enforce_eager,
    )
    link = LocalAttentionLink(attention, describe(attention))
    experts: LocalExperts | list[ExpertLink] = [expert_link(address) for address in addresses]
    if not addresses:
        experts = load_experts(settings, attention.device, ExpertMetrics(registry))
    engine = build_engine(model, router, [link], metrics, experts)
    expose(registry, model, engine, router)
    membership = Membership(engine, None, (sources, addresses), None, expert_link) if addresses else None
    server = ServerSettings(
        listen=f"{settings.host}:{port}",
        metrics_port=settings.metrics_port,
        exit_on_stdin_eof=settings.exit_on_stdin_eof,
        **settings.security(),
        **settings.logs(),
    )

    async def join() -> None:
        await engine.start(say)
        if membership is not None:
            membership.start()
        where = f"experts at {', '.join(addresses)}" if addresses else "all roles in this process"
        say(f"serving {model.name} in {settings.dtype}, {where}")

    try:
        gateway = None
        if settings.openai:
            gateway = gateway_process(
                server.listen, settings.model, settings.host, settings.openai_port, settings, settings.traces
            )
        pages = status_pages(engine, model.name)
        readiness = engine.on_serving if membership is not None else None
        services = build_services(model, engine, router)
        serving = run(server, services, registry, before_ready=join, readiness=readiness, pages=pages)
        await (serve_with(gateway, serving) if gateway else serving)
    finally:
        if membership is not None:
            membership.stop()
        await engine.close()
