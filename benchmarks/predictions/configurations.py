"""What is measured: models of three sizes, numbers of expert workers, lanes, batches, lengths, and traffic."""

from __future__ import annotations

import dataclasses

from benchmarks.scaling.models import SMALL
from benchmarks.step.loads import Load
from grokmoe.model_config import BENCH, ModelConfig

MIDDLE = dataclasses.replace(
    BENCH,
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=2048,
    num_layers=6,
    num_heads=8,
    num_kv_heads=2,
    head_dim=64,
    attention_logit_scale=0.0,  # as the size of the heads has it
)
"""0.16 billion parameters: ten times what a cache holds, a sixth of the largest."""

MODELS: dict[str, ModelConfig] = {"small": SMALL, "middle": MIDDLE, "large": BENCH}
"""small lies in a cache, middle and large in memory."""

CACHED = {"large": "bench", "middle": "predictions-middle", "small": "predictions-small"}
"""Where each is kept."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """expert_workers: 0 is fused. lanes: steps in flight. has_traffic: loaded with requests that come at random."""

    model: str
    expert_workers: int
    lanes: int = 1
    has_traffic: bool = False

    @property
    def name(self) -> str:
        """As tables have it."""
        if not self.expert_workers:
            return "fused"
        workers = f"{self.expert_workers} worker{'s' if self.expert_workers > 1 else ''}"
        return workers if self.lanes == 1 else f"{workers}, {self.lanes} lanes"


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Requests/s, Poisson; tokens of each; seconds of it."""

    rate: float
    prompt: int
    output: int
    seconds: float
    seed: int = 0

    @property
    def num_requests(self) -> int:
        """Of the whole."""
        return round(self.rate * self.seconds)


STEPS = (
    Load("prefill 512", 1, 512, 1),
    Load("prefill 1500", 1, 1500, 1),
    Load("decode 1", 1, 128, 48),
    Load("decode 8", 8, 128, 48),
    Load("decode 8 at 1024", 8, 1024, 48),
    Load("decode 32", 32, 128, 48),
)

LANES = (Load("decode 32", 32, 128, 48), Load("decode 64", 64, 128, 48))
"""Enough sequences for the scheduler to make two steps of them."""

RATES = {"small": (5.0, 15.0), "middle": (2.0, 6.0), "large": (0.7, 1.6)}
"""Requests/s: about a quarter and two thirds of what two workers serve."""


def topologies() -> list[Topology]:
    """All of them, in the order in which they are measured."""
    found = []
    for model in MODELS:
        found += [Topology(model, workers) for workers in (0, 1, 2, 4)]
        found += [Topology(model, 2, lanes=2), Topology(model, 2, has_traffic=True)]
    return found


def loads_of(topology: Topology) -> tuple[Load, ...]:
    """Steps that a topology is measured with."""
    if topology.has_traffic:
        return ()
    return STEPS if topology.lanes == 1 else LANES


def traffics_of(topology: Topology) -> tuple[Traffic, ...]:
    """Traffic that it is measured with."""
    return tuple(Traffic(rate, 128, 32, 30.0) for rate in RATES[topology.model]) if topology.has_traffic else ()
