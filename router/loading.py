"""From settings to an engine and its service; used by the router's own process and by the fused one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from prometheus_client import CollectorRegistry

from grokmoe import checkpoint_part
from grokmoe import tensor_names as names
from grokmoe.checkpoint import Checkpoint
from grokmoe.device_thread import DeviceThread
from grokmoe.errors import ConfigError
from grokmoe.model_config import ModelConfig
from grokmoe.server import Service
from grokmoe.telemetry import RouterMetrics
from grokmoe.tokenizer import Tokenizer
from grokmoe.tracing import Tracing
from router import row_loops
from router.cell import MakeHole
from router.config import RouterSettings, read_placement
from router.control import ControlService
from router.engine import Engine
from router.experts import ExpertPool
from router.fault_metrics import FaultCollector
from router.legs import Legs
from router.moe import Gates, LocalExperts, LocalMoe, RecordableExperts, RemoteMoe, RowCounter
from router.request_metrics import StragglerTime
from router.service import GenerationService
from router.step_traces import StepTraces
from router.transport.base import AttentionLink, ExpertLink, Hole
from router.vllm_aliases import VllmAliases
from router.vllm_engine import vllm_engine_service


@dataclasses.dataclass(frozen=True)
class RouterModel:
    """The router's slice of a checkpoint."""

    config: ModelConfig
    dtype: torch.dtype
    gates: Gates
    tokenizer: Tokenizer | None
    name: str


def load_model(settings: RouterSettings) -> RouterModel:
    """Reads config, gates and tokenizer. Raises StartupError."""
    directory = Path(settings.model)
    with Checkpoint.open(directory, settings.variant, checkpoint_part.router) as checkpoint:
        config = checkpoint.config
        gates = [checkpoint.read(names.gate(layer), torch.float32) for layer in range(config.num_layers)]
    tokenizer = Tokenizer.from_directory(directory)
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        limit = config.vocab_size
        raise ConfigError(f"{directory}: its tokenizer has {tokenizer.vocab_size} ids, the model's vocabulary {limit}")
    name = settings.model_name or directory.resolve().name
    return RouterModel(config, getattr(torch, settings.dtype), Gates.from_weights(gates), tokenizer, name)


def build_engine(
    model: RouterModel,
    settings: RouterSettings,
    attention_links: Sequence[AttentionLink],
    metrics: RouterMetrics,
    experts: LocalExperts | Sequence[ExpertLink],
) -> Engine:
    """Puts an engine together. experts: a function for experts in this process, otherwise links."""
    config, counter = model.config, RowCounter(model.config)
    row_loops.compile_all(model.dtype)
    pool = None
    make_hole: MakeHole
    if callable(experts):
        local = experts
        record_experts = experts.record if isinstance(experts, RecordableExperts) else None

        def make_hole(lane: int, legs: Legs, deadline: float | None) -> Hole:
            return LocalMoe(config, model.gates, local, counter, legs, record_experts)

    else:
        placement = read_placement(settings.placement, config.num_experts)
        pool = ExpertPool(config, model.dtype, list(experts), placement, settings.pool_settings())
        compute = DeviceThread("router-compute")
        remote = pool

        def make_hole(lane: int, legs: Legs, deadline: float | None) -> Hole:
            return RemoteMoe(config, model.gates, remote, counter, compute, lane, legs, deadline)

    engine_settings = settings.engine_settings(config.context_length)
    engine = Engine(config, model.dtype, attention_links, make_hole, pool, counter, engine_settings, metrics)
    tracing = Tracing.open(settings, "grokmoe-router")
    if tracing is not None:
        engine.traces = StepTraces(tracing)
    if pool is not None:
        pool.on_layer.append(StragglerTime(metrics))
        if engine.traces is not None:
            pool.on_layer.append(engine.traces.layer_done)
    return engine


def expose(registry: CollectorRegistry, model: RouterModel, engine: Engine, settings: RouterSettings) -> None:
    """What is read from the engine, and not counted, when somebody asks for the metrics."""
    registry.register(FaultCollector(engine))
    if settings.vllm_metrics:
        registry.register(VllmAliases(engine.metrics, model.name))


def build_services(model: RouterModel, engine: Engine, settings: RouterSettings) -> list[Service]:
    """What clients see of an engine: inference, control, and the ecosystem's service where its stubs are installed."""
    dtype = str(model.dtype).removeprefix("torch.")
    generation = GenerationService(
        engine, model.tokenizer, model.name, dtype, settings.refuse_control_symbols, settings.log_requests
    )
    services = [generation.as_service(), ControlService(engine).as_service()]
    ecosystem = vllm_engine_service(generation, engine, model.name, dtype, settings.model)
    return services if ecosystem is None else [*services, ecosystem]
