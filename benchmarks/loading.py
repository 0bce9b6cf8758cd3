"""How long does an expert worker take until it can be used, and how much memory on the way?

    python -m benchmarks.loading [--help]

One worker after the other, each a process, with all experts of a checkpoint: by default a random one of the preset
`bench`, made in a temporary folder. Prints a table and, as the last line, one JSON object. "ready" is from the start of
the process; "kept" what the weights take as they are laid out; "peak" the most that the process had resident, less what
one has without experts; "over" the difference, what loading took beside what it left. The file is in the system's cache
from the second worker on;
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import tempfile
import time
from pathlib import Path

import torch

from expert_worker.config import ExpertWorkerSettings
from expert_worker.expert_dtype import EXPERT_DTYPES
from expert_worker.experts import ExpertSet
from grokmoe.checkpoint_writer import random_checkpoint
from grokmoe.model_config import ModelConfig
from grokmoe.server import ServerSettings
from grokmoe.settings import to_flags
from launcher.checkpoint import PRESETS
from launcher.process import RoleProcess

HEADER = "experts in          ready s   kept MiB   peak MiB   over MiB"
LINE = "{expert_dtype:18} {ready:8.1f} {kept:10.0f} {peak:10.0f} {over:10.0f}"
MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Load:
    """One worker's, in seconds and MiB."""

    expert_dtype: str
    ready: float
    kept: float
    peak: float
    over: float


async def start(model: Path, expert_dtype: str, experts: str, threads: int) -> tuple[float, float]:
    """(seconds until it is ready, the most MiB that it had resident)."""
    worker = ExpertWorkerSettings(model=str(model), expert_dtype=expert_dtype, experts=experts, threads=threads)
    flags = [*to_flags(worker), *to_flags(ServerSettings())]
    process = RoleProcess("expert", 0, "expert_worker", flags, lambda line: None)
    began = time.perf_counter()
    await process.start()
    try:
        await process.wait_ready()
        ready = time.perf_counter() - began
        return ready, await asyncio.to_thread(peak_mib, process.pid)
    finally:
        await process.stop()


def peak_mib(pid: int) -> float:
    """The most that a process has had resident."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024


def kept(config: ModelConfig, expert_dtype: str) -> float:
    """MiB of all experts."""
    experts = ExpertSet(config, {}, torch.bfloat16, torch.device("cpu"), expert_dtype=expert_dtype)
    return config.num_layers * config.num_experts * experts.expert_bytes / MIB


async def measure(model: Path, threads: int) -> list[Load]:
    """Of every type that experts can be stored in."""
    config, found = ModelConfig.from_file(model), []
    for expert_dtype in EXPERT_DTYPES:
        _, empty = await start(model, expert_dtype, "none", threads)
        ready, peak = await start(model, expert_dtype, "all", threads)
        size = kept(config, expert_dtype)
        found.append(Load(expert_dtype, ready, size, peak - empty, peak - empty - size))
        print(LINE.format(**dataclasses.asdict(found[-1])), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="checkpoint directory; default: a random one")
    parser.add_argument("--preset", default="bench", choices=sorted(PRESETS))
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model
        if model is None:
            model = Path(folder) / "model"
            random_checkpoint(model, PRESETS[arguments.preset])
        print(HEADER, flush=True)
        found = asyncio.run(measure(model, arguments.threads))
    print(json.dumps({"model": arguments.preset, "loads": [dataclasses.asdict(each) for each in found]}))


if __name__ == "__main__":
    main()
