"""Requests that arrive: drawn from a seed, as a load test of these rates and lengths draws them."""

from __future__ import annotations

import dataclasses

import numpy as np

from loadtest.lengths import Lengths


@dataclasses.dataclass(frozen=True)
class Arrival:
    """One request. time: seconds. prompt, output: tokens."""

    time: float
    prompt: int
    output: int


@dataclasses.dataclass(frozen=True)
class Load:
    """rate: requests/s, Poisson. Lengths in tokens."""

    rate: float
    prompt: Lengths
    output: Lengths


def mean_length(lengths: Lengths, num: int = 4096) -> float:
    """Of a distribution; of a drawn sample where it is clipped."""
    return float(lengths.draw(np.random.default_rng(7), num).mean())


def draw(load: Load, num: int, seed: int, most_tokens: int) -> list[Arrival]:
    """The first `num` requests. Outputs are cut so that none is longer than `most_tokens`, nor a prompt."""
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(1 / load.rate, num))
    prompts = np.minimum(load.prompt.draw(rng, num), most_tokens - 1)
    outputs = np.minimum(load.output.draw(rng, num), most_tokens - prompts)
    return [Arrival(float(t), int(p), int(o)) for t, p, o in zip(times, prompts, outputs, strict=True)]


def together(batch: int, prompt: int, output: int) -> list[Arrival]:
    """`batch` requests at the same time."""
    return [Arrival(0.0, prompt, output)] * batch
