"""What a load is run on: processes of the service, started and ended."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import torch

from grokmoe import AsyncClient
from grokmoe.checkpoint_writer import random_checkpoint
from grokmoe.model_config import BENCH, ModelConfig
from grokmoe.settings import to_flags
from launcher.paths import DEMO_MODEL
from launcher.process import RoleProcess
from launcher.serve import ServeSettings
from launcher.up import Cluster, UpSettings


class Service:
    """A running service. processes: its ids by name. num_workers: of experts; 0: fused. address: of its own."""

    def __init__(self, client: AsyncClient, processes: dict[str, int], num_workers: int, address: str) -> None:
        self.client, self.processes, self.num_workers, self.address = client, processes, num_workers, address


def topology_name(num_workers: int) -> str:
    """As the tables have it."""
    return f"split {num_workers}" if num_workers else "fused"


@contextlib.asynccontextmanager
async def start(model: Path, dtype: str, num_workers: int, **limits: Any) -> AsyncIterator[Service]:
    """`grokmoe serve` (no workers) or `grokmoe up` with one attention worker. limits: other settings of either."""
    if num_workers:
        settings = UpSettings(model=str(model), dtype=dtype, experts=num_workers, port=0, log_level="warning", **limits)
        async with Cluster(settings) as cluster, AsyncClient(cluster.address) as client:
            processes = {process.name: process.pid for process in cluster.processes}
            yield Service(client, processes, num_workers, cluster.address)
        return
    serve = ServeSettings(model=str(model), dtype=dtype, port=0, log_level="warning", **limits)
    process = RoleProcess("serve", 0, "launcher", ["serve", *to_flags(serve)])
    await process.start()
    try:
        await process.wait_ready()
        async with AsyncClient(process.address) as client:
            yield Service(client, {process.name: process.pid}, 0, process.address)
    finally:
        await process.stop()


def model_directory(preset: str, cache: Path) -> Path:
    """Of the embedded demo model, or of the random one of the benchmarks, which is made if it is not there."""
    if preset == "demo":
        return DEMO_MODEL
    return random_model(cache / preset, BENCH)


def random_model(directory: Path, config: ModelConfig) -> Path:
    """A random checkpoint in this directory, made if it is not there: beside it, then renamed, never half a one."""
    if not (directory / "config.json").exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent) as beside:
            random_checkpoint(Path(beside) / "model", config, dtype=torch.bfloat16)
            os.replace(Path(beside) / "model", directory)
    return directory
