"""An attention engine of tiny-a in float32, and its holes filled by the plain reference of the experts."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import torch

from attention_worker.engine import AttentionEngine, AttentionEngineSettings, MoeInput, StepRun
from attention_worker.lora.adapter import Base
from attention_worker.lora.sources import AdapterSources
from attention_worker.lora.store import AdapterStore
from attention_worker.sharding import Shard
from attention_worker.weights import AttentionWeights, load_weights
from expert_worker import weights as expert_weights
from expert_worker.experts import ExpertSet
from grokmoe import tensor_names
from grokmoe.checkpoint import Checkpoint
from grokmoe.device_thread import DeviceThread
from grokmoe.linear import new_linear
from grokmoe.step_plan import SequenceChunk, StepPlan, StepResult
from grokmoe.telemetry import AttentionMetrics, new_registry
from router.legs import Legs
from router.moe import Gates, LocalMoe, RowCounter
from tests import goldens

CONFIG = goldens.config()
DTYPE = torch.float32


@functools.cache
def _weights(held: range) -> AttentionWeights:
    with Checkpoint.open(goldens.DIRECTORY) as checkpoint:
        return load_weights(checkpoint, DTYPE, torch.device("cpu"), held=held)


@functools.cache
def device() -> DeviceThread:
    """One for all engines."""
    thread = DeviceThread("test-attention")
    thread.call(torch.set_num_threads, 1)
    return thread


@functools.cache
def moe() -> LocalMoe:
    """All experts of the model."""
    with Checkpoint.open(goldens.DIRECTORY) as checkpoint:
        held = {layer: tuple(range(CONFIG.num_experts)) for layer in range(CONFIG.num_layers)}
        experts = ExpertSet(CONFIG, held, DTYPE, torch.device("cpu"))
        expert_weights.load(experts, checkpoint)
        gates = Gates.from_weights(
            [checkpoint.read(tensor_names.gate(layer), DTYPE) for layer in range(CONFIG.num_layers)]
        )
    return LocalMoe(CONFIG, gates, experts.forward, RowCounter(CONFIG), Legs())


def attention_engine(
    num_pages: int = 64,
    page_size: int = 8,
    max_step_tokens: int = 512,
    held: range = range(CONFIG.num_layers),
    adapters: AdapterStore | None = None,
) -> AttentionEngine:
    """A worker just started."""
    sizes = AttentionEngineSettings(num_pages, page_size, max_step_tokens)
    return AttentionEngine(CONFIG, _weights(held), sizes, AttentionMetrics(new_registry()), device(), adapters=adapters)


def read_tensor(name: str) -> torch.Tensor:
    """One of the model's tensors."""
    with Checkpoint.open(goldens.DIRECTORY) as checkpoint:
        return checkpoint.read(name, DTYPE)


def adapter_store(
    named: Mapping[str, Path],
    root: Path | None = None,
    max_bytes: int = 1 << 30,
    held: range = range(CONFIG.num_layers),
) -> AdapterStore:
    """Adapters of tiny-a, those named loaded."""
    base = Base(CONFIG, held, Shard.whole(CONFIG), DTYPE, torch.device("cpu"), read_tensor, new_linear)
    sources = AdapterSources(named, root)
    store = AdapterStore(base, sources, max_bytes, AttentionMetrics(new_registry()), device())
    store.load_named()
    return store


def plan(engine: AttentionEngine, *chunks: SequenceChunk) -> StepPlan:
    """A plan for this engine."""
    return StepPlan(engine.incarnation, chunks)


def fill(at: MoeInput) -> torch.Tensor:
    """The MoE output of a hole."""
    return moe().fill_now(at.layer, at.x_TD)


def finish(run: StepRun) -> StepResult:
    """Drives a run that has not begun to its end."""
    at = run.advance(None)
    while isinstance(at, MoeInput):
        at = run.advance(fill(at))
    return at


def run_step(engine: AttentionEngine, *chunks: SequenceChunk) -> StepResult:
    """One step, on the caller's thread."""
    return finish(engine.begin(plan(engine, *chunks)))
