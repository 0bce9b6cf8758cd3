"""`python -m expert_worker`: one expert worker as a process."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from collections.abc import Sequence

import torch

from expert_worker import weights
from expert_worker.config import ExpertWorkerSettings
from expert_worker.engine import ExpertEngine
from expert_worker.experts import ExpertSet
from expert_worker.loader import ExpertLoader
from expert_worker.service import ExpertService
from grokmoe import checkpoint_part
from grokmoe.checkpoint import Checkpoint
from grokmoe.device_thread import DeviceThread
from grokmoe.errors import ConfigError
from grokmoe.expert_ranges import ranges_of, size_of
from grokmoe.expert_spec import describe_ranges, parse_experts
from grokmoe.expert_units import slice_of
from grokmoe.model_config import ModelConfig
from grokmoe.role import run_role
from grokmoe.server import ServerSettings, run
from grokmoe.telemetry import ExpertMetrics, new_registry
from grokmoe.tracing import Tracing

logger = logging.getLogger(__name__)

DESCRIPTION = """\
Serves some or all experts of a Grok-1 model: takes rows sorted by expert, returns one output row for each. It keeps
nothing between calls, so any number of workers may hold the same experts, and any number of routers may share a
worker. Calls for one layer that wait at the same time are computed together. Experts can be loaded and given up while
it serves.
Prints METRICS <address> and READY <address> on standard output when it can be used; until then the health of
grokmoe.v1.Expert is NOT_SERVING. SIGTERM ends it after the calls it has begun."""

EPILOG = """\
examples:
  all experts of a checkpoint, on the CPU:
    python -m expert_worker --model /models/grok-1 --listen 0.0.0.0:7101
  two workers that share the experts; start a third like either of them for a replica:
    python -m expert_worker --model /models/grok-1 --experts 0-3 --listen 0.0.0.0:7101
    python -m expert_worker --model /models/grok-1 --experts 4-7 --listen 0.0.0.0:7102
  experts 0 to 7 in the first half of the layers, and expert 7 in all of them, on the second GPU:
    python -m expert_worker --model /models/grok-1 --experts 0-7@0-31+7@all --device cuda:1
  the first half of every expert, cut along the ffn dimension; the second half, 0-7:2/2, on another worker:
    python -m expert_worker --model /models/grok-1 --experts 0-7:1/2 --listen 0.0.0.0:7101
  a spare: holds nothing until it is told to (grokmoe.v1.Expert/Load), and two experts of 64 layers at most:
    python -m expert_worker --model /models/grok-1 --experts none --capacity 128 --listen 0.0.0.0:7103

Every flag can be given as an environment variable: --max-rows as GROKMOE_MAX_ROWS."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs until SIGTERM. Returns the exit code: 1, with a message, when it cannot start."""
    return run_role("expert_worker", DESCRIPTION, EPILOG, ExpertWorkerSettings, serve, argv)


async def serve(worker: ExpertWorkerSettings, server: ServerSettings) -> None:
    """Opens the checkpoint and serves until a signal comes. Raises StartupError."""
    if not worker.model:
        raise ConfigError("model is missing: the directory of a checkpoint")

    def needed(config: ModelConfig) -> set[tuple[int, int]]:
        held = parse_experts(worker.experts, config.num_experts, config.num_layers)
        return {(layer, slice_of(unit)[0]) for layer, units in held.items() for unit in units}

    with Checkpoint.open(worker.model, worker.variant, checkpoint_part.experts(needed)) as checkpoint:
        await _serve(worker, server, checkpoint)


async def _serve(worker: ExpertWorkerSettings, server: ServerSettings, checkpoint: Checkpoint) -> None:
    """Wires the parts together, serves, and meanwhile loads: health answers from the start."""
    config = checkpoint.config
    held = parse_experts(worker.experts, config.num_experts, config.num_layers)
    dtype, torch_device = getattr(torch, worker.dtype), _device(worker.device)
    experts = ExpertSet(config, held, dtype, torch_device, worker.deterministic, worker.capacity, worker.expert_dtype)
    registry = new_registry()
    metrics = ExpertMetrics(registry)
    device = DeviceThread("expert-device")
    engine = ExpertEngine(experts, metrics, device, worker.max_batch_rows)
    is_ready, is_stopping = threading.Event(), threading.Event()

    # Torch keeps a team of threads for every thread that computes. The event loop's only copies memory: without this
    # it would get a team of its own, which would spin on the cores of the device thread's.
    num_threads = worker.threads or torch.get_num_threads()
    torch.set_num_threads(1)
    loader = ExpertLoader(experts, checkpoint, device, metrics)
    tracing = Tracing.open(worker, "grokmoe-expert-worker")
    service = ExpertService(engine, metrics, worker.max_rows, is_ready.is_set, loader, tracing, worker.pairs)

    def load() -> None:
        torch.set_num_threads(num_threads)
        weights.load(experts, checkpoint, is_stopping.is_set)
        experts.warm_up()

    async def before_ready() -> None:
        await device.run(load)
        is_ready.set()
        logger.info(_held(experts))

    try:
        await run(server, [service.as_service()], registry, before_ready)
    finally:
        is_stopping.set()
        loader.close()
        device.stop()
        if tracing is not None:
            await asyncio.to_thread(tracing.close)


def _held(experts: ExpertSet) -> str:
    """What a worker that is ready holds, in a line."""
    held, capacity = experts.holdings.held, experts.holdings.capacity
    limit = f" of {capacity} it can hold" if capacity else ""
    gib = experts.bytes_of(held) / 2**30
    return f"holds experts {describe_ranges(ranges_of(held))}: {size_of(held)}{limit}, layer by layer, {gib:.2f} GiB"


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter: a torch built without CUDA
        raise ConfigError(f"device is {name!r}: {str(error).splitlines()[0]}") from error
    return device


if __name__ == "__main__":
    sys.exit(main())
