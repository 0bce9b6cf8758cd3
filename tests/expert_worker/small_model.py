"""A small model's experts with random weights, and what the twin makes of rows that go through them."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from prometheus_client import CollectorRegistry

from expert_worker import weights
from expert_worker.experts import ExpertSet
from expert_worker.kernels import reference
from grokmoe.checkpoint import Checkpoint
from grokmoe.checkpoint_writer import random_checkpoint
from grokmoe.device_thread import DeviceThread
from grokmoe.model_config import TINY, Gelu, ModelConfig
from grokmoe.telemetry import ExpertMetrics
from grokmoe.tensor_names import EXPERT_LINEARS, expert

CPU = torch.device("cpu")
HELD = {0: tuple(range(8)), 1: tuple(range(8))}


def write(directory: Path, config: ModelConfig = TINY, dtype: torch.dtype = torch.float32) -> Path:
    """A checkpoint in `directory`."""
    random_checkpoint(directory, config, dtype=dtype)
    return directory


def load(
    directory: Path,
    dtype: torch.dtype = torch.float32,
    held: Mapping[int, Sequence[int]] = HELD,
    device: torch.device = CPU,
    variant: str = "vllm",
) -> ExpertSet:
    """Experts of the checkpoint there."""
    with Checkpoint.open(directory, variant) as checkpoint:
        experts = ExpertSet(checkpoint.config, held, dtype, device)
        weights.load(experts, checkpoint)
    return experts


@functools.lru_cache
def _stacks(directory: Path, layer: int, dtype: torch.dtype) -> list[torch.Tensor]:
    with Checkpoint.open(directory) as checkpoint:
        return [
            torch.stack(
                [checkpoint.read(expert(layer, e, linear), dtype) for e in range(checkpoint.config.num_experts)]
            )
            for linear in EXPERT_LINEARS
        ]


def twin(
    directory: Path, layer: int, expert_ids: Sequence[int], counts: Sequence[int], rows_ND: torch.Tensor
) -> torch.Tensor:
    """The output rows as the plain twin computes them from the checkpoint, in the default variant."""
    gate_EFD, up_EFD, down_EDF = (stack[list(expert_ids)] for stack in _stacks(directory, layer, rows_ND.dtype))
    return reference.expert_mlp(rows_ND, counts, gate_EFD, up_EFD, down_EDF, Gelu.ERF)


def draw(
    num_rows: int, width: int = TINY.hidden_size, dtype: torch.dtype = torch.float32, seed: int = 0
) -> torch.Tensor:
    """Rows of order 1."""
    return torch.randn(num_rows, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(actual: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal shape and type, and near by relative RMS: the CPU path rounds bfloat16 once more than the twin."""
    assert actual.shape == wanted.shape
    assert actual.dtype == wanted.dtype
    if not wanted.numel():
        return
    error = (actual.double() - wanted.double()).square().mean().sqrt()
    relative = (error / wanted.double().square().mean().sqrt()).item()
    assert relative < (1e-5 if wanted.dtype is torch.float32 else 6e-3), relative


@contextlib.contextmanager
def device_thread() -> Iterator[DeviceThread]:
    device = DeviceThread("test-device")
    try:
        yield device
    finally:
        device.stop()


def new_metrics() -> tuple[ExpertMetrics, CollectorRegistry]:
    registry = CollectorRegistry()
    return ExpertMetrics(registry), registry


async def until(condition: object, timeout: float = 5.0) -> None:
    """Waits until `condition()` is true."""
    assert callable(condition)
    async with asyncio.timeout(timeout):
        while not condition():  # noqa: ASYNC110 - what is awaited happens on another thread
            await asyncio.sleep(0.002)
