"""The yardstick as a contender, and the process that it measures in: `python -m benchmarks.peers.yardstick JOB`."""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers import child
from benchmarks.peers.contender import Measured
from benchmarks.peers.goals import PARTS, TORCH
from benchmarks.peers.straight_torch import StraightTorch
from benchmarks.peers.workload import Workload, decode, prefill


@dataclasses.dataclass(frozen=True)
class Yardstick:
    """The contender, and the parts of it as another row."""

    model: Path
    threads: int
    row: str = TORCH

    def missing(self) -> str | None:
        """Nothing: it needs what the service needs."""
        return None

    async def measure(self, workload: Workload, seed: int) -> Measured:
        """Raises PeerFailed."""
        job = {"model": str(self.model), "threads": self.threads, "seed": seed} | dataclasses.asdict(workload)
        lines = await child.output([sys.executable, "-m", __spec__.name, json.dumps(job)])
        found = child.results(lines)
        rows: dict[str, dict[str, float]] = {self.row: {}, PARTS: {}}
        for name, value in found.items():
            row, _, metric = name.partition(": ")
            rows[row][metric] = value
        return rows


def measure(model: StraightTorch, job: dict[str, Any]) -> dict[str, float]:
    """`row: metric` -> tokens/s, both of whole steps and of their parts."""
    found: dict[str, float] = {}
    vocab_size = model.config.vocab_size
    for length in job["prefills"]:
        ids = torch.randint(vocab_size, (length,))
        model.prefill(ids)
        whole, parts = [], []
        for _ in range(job["repeats"]):
            model.parts, begin = 0.0, time.perf_counter()
            model.prefill(ids)
            whole.append(length / (time.perf_counter() - begin))
            parts.append(length / model.parts)
        found |= _both(prefill(length).name, whole, parts)
    for batch in job["batches"]:
        caches = model.caches(batch, job["prompt"] + job["new"])
        whole, parts = [], []
        for number in range(job["repeats"] + 1):
            ids = torch.randint(vocab_size, (batch,))
            model.parts, begin = 0.0, time.perf_counter()
            for step in range(job["new"]):
                ids = model.decode(ids, job["prompt"] + step, caches)
            if number:
                whole.append(batch * job["new"] / (time.perf_counter() - begin))
                parts.append(batch * job["new"] / model.parts)
        found |= _both(decode(batch).name, whole, parts)
    return found


def _both(metric: str, whole: list[float], parts: list[float]) -> dict[str, float]:
    return {f"{TORCH}: {metric}": statistics.median(whole), f"{PARTS}: {metric}": statistics.median(parts)}


def main() -> None:
    """Prints the metrics in one line that begins with RESULT."""
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    torch.set_grad_enabled(False)
    torch.manual_seed(job["seed"])
    print(child.RESULT + json.dumps(measure(StraightTorch(Path(job["model"])), job)), flush=True)


if __name__ == "__main__":
    main()
