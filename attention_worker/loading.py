"""From settings to a loaded engine; used by the worker's own process and by the fused one."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
from typing import NamedTuple

import torch

from attention_worker.config import AttentionWorkerSettings, parse_layers
from attention_worker.engine import AttentionEngine, AttentionEngineSettings, num_pages_in
from attention_worker.lora.adapter import Base
from attention_worker.lora.sources import AdapterSources
from attention_worker.lora.store import AdapterStore
from attention_worker.ranks.meeting import Meeting
from attention_worker.sharding import Shard
from attention_worker.weights import AttentionWeights, load_weights, row_counts
from grokmoe import checkpoint_part
from grokmoe.checkpoint import Checkpoint
from grokmoe.device_thread import DeviceThread
from grokmoe.errors import ConfigError
from grokmoe.linear import Linear, new_linear
from grokmoe.model_config import ModelConfig
from grokmoe.native import has_dots
from grokmoe.telemetry import AttentionMetrics

logger = logging.getLogger(__name__)


class Part(NamedTuple):
    """What an engine is made of: that of one rank, or of a worker that has no others."""

    config: ModelConfig
    weights: AttentionWeights
    sizes: AttentionEngineSettings


def load_engine(
    settings: AttentionWorkerSettings, metrics: AttentionMetrics, device: DeviceThread, enforce_eager: bool = False
) -> AttentionEngine:
    """Reads this role's slice of the checkpoint and allocates the KV pages, for a worker of one rank. Raises
    StartupError.

    enforce_eager: see AttentionEngineSettings.

    All of it happens on the device thread. Torch keeps a team of threads for every thread that computes; one team for
    the caller's thread as well would spin on the device thread's cores, so the caller's is reduced to itself.
    """
    num_threads = settings.threads or torch.get_num_threads()
    torch.set_num_threads(1)
    return device.call(_load, settings, metrics, device, num_threads, enforce_eager)


def _load(
    settings: AttentionWorkerSettings,
    metrics: AttentionMetrics,
    device: DeviceThread,
    num_threads: int,
    enforce_eager: bool,
) -> AttentionEngine:
    torch.set_num_threads(num_threads)
    config, weights, sizes = load_part(settings)
    sizes = dataclasses.replace(sizes, enforce_eager=enforce_eager)
    store = adapter_store(settings, config, weights, metrics, device)
    store.load_named()
    engine = AttentionEngine(config, weights, sizes, metrics, device, adapters=store)
    engine.warm_up()
    return engine


def adapter_store(
    settings: AttentionWorkerSettings,
    config: ModelConfig,
    weights: AttentionWeights,
    metrics: AttentionMetrics,
    device: DeviceThread,
) -> AdapterStore:
    """Where the adapters that the operator has named are, empty. Raises ConfigError."""

    def read(name: str) -> torch.Tensor:
        with Checkpoint.open(settings.model, settings.variant) as checkpoint:
            return checkpoint.read(name, weights.dtype)

    def make_linear(rows_XD: torch.Tensor) -> Linear:
        return new_linear(rows_XD, settings.deterministic)

    base = Base(config, weights.held, weights.shard, weights.dtype, weights.device, read, make_linear)
    sources = AdapterSources.from_flags(settings.lora, settings.lora_root)
    return AdapterStore(base, sources, int(settings.lora_gib * 2**30), metrics, device)


def load_part(settings: AttentionWorkerSettings, meeting: Meeting | None = None) -> Part:
    """Reads the weights. meeting: where the ranks of a worker agree before they do; None: there is one. Raises
    StartupError."""
    if not settings.model:
        raise ConfigError("model is missing: the directory of a checkpoint")
    dtype, torch_device = getattr(torch, settings.dtype), _device(settings.device)
    part = checkpoint_part.attention(lambda config: parse_layers(settings.layers, config.num_layers))
    with Checkpoint.open(settings.model, settings.variant, part) as checkpoint:
        config = checkpoint.config
        held = parse_layers(settings.layers, config.num_layers)
        num_pages = settings.num_pages or num_pages_in(
            config, len(held), dtype, settings.page_size, settings.kv_gib, settings.tensor_parallel
        )
        sizes = AttentionEngineSettings(num_pages, settings.page_size, settings.max_step_tokens)
        shard = Shard.whole(config)
        if meeting is not None:
            shard = Shard.of(config, meeting.rank, meeting.size)
            meeting.agree(_facts(settings, config, held, sizes, torch_device))
        weights = load_weights(checkpoint, dtype, torch_device, settings.deterministic, held, shard)
    if settings.deterministic:
        logger.info("deterministic; row counts of products: %s", row_counts(weights))
    return Part(config, weights, sizes)


def _facts(
    settings: AttentionWorkerSettings,
    config: ModelConfig,
    held: range,
    sizes: AttentionEngineSettings,
    torch_device: torch.device,
) -> dict[str, object]:
    """What must be the same on all ranks. Processors, too: all ranks keep the residual, and it must be the same to the
    bit."""
    return {
        "tensor_parallel": settings.tensor_parallel,
        "config hash": config.content_hash,
        "dtype": settings.dtype,
        "layers": f"{held.start}-{held.stop - 1}",
        "deterministic": settings.deterministic,
        "page_size": sizes.page_size,
        "num_pages": sizes.num_pages,
        "max_step_tokens": sizes.max_step_tokens,
        "device": torch_device.type,
        "torch": torch.__version__,
        "processor": f"{torch.backends.cpu.get_cpu_capability()}{', bfloat16' * has_dots()}",
    }


def _device(name: str) -> torch.device:
    """The device, if this torch and this machine have it, and with it the kernels that it needs."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter: a torch built without CUDA
        raise ConfigError(f"device is {name!r}: {str(error).splitlines()[0]}") from error
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ConfigError(f"device is {name!r}, which needs Triton: install grokmoe[server,gpu]")
    # Products that the library splits are added up in float32, not in the type of the result.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    return device
