"""How long the experts of one step take: layer by layer the slowest card, averaged over draws of the routing.

Letters: S draws, E experts, W cards. Which experts a token goes to is taken for random and even.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter

import numpy as np
import numpy.typing as npt

from grokmoe.model_config import ModelConfig
from planner.costs import Efficiency
from planner.layout import Layout
from planner.model_size import expert_bytes, expert_params

NUM_DRAWS = 64
"""Draws of the routing: the mean of a maximum is then known to a few percent."""

EXACT_ROWS = 64
"""Rows up to which each row's experts are drawn without repetition; above it, numbers of rows are."""


@dataclasses.dataclass(frozen=True)
class ExpertsTime:
    """Of one step. seconds: of its slowest cards, all layers. workers: that get rows, mean of a layer. busy: seconds of
    cards, summed over them, for how much of them is used."""

    seconds: float
    workers: float
    busy: float


@functools.lru_cache(maxsize=256)
def draw_rows(num_experts: int, top_k: int, rows: int, seed: int = 0) -> npt.NDArray[np.int64]:
    """Rows of each expert, rows_SE, for so many tokens."""
    rng = np.random.default_rng([seed, num_experts, top_k, rows])
    if rows <= EXACT_ROWS:
        order_SBE = rng.random((NUM_DRAWS, rows, num_experts)).argsort(axis=2)[:, :, :top_k]
        flat = order_SBE + num_experts * np.arange(NUM_DRAWS)[:, None, None]
        return np.bincount(flat.ravel(), minlength=NUM_DRAWS * num_experts).reshape(NUM_DRAWS, num_experts)
    return rng.multinomial(rows * top_k, np.full(num_experts, 1 / num_experts), size=NUM_DRAWS)


def distinct_experts(num_experts: int, top_k: int, rows: int) -> float:
    """Experts that so many tokens need in a layer, in the mean: E (1 - (1 - k/E) ** rows)."""
    return float(num_experts * (1 - (1 - top_k / num_experts) ** rows))


def experts_time(
    layout: Layout,
    costs: dict[str, Efficiency],
    rows: int,
    config: ModelConfig,
    dtype: str,
    share: int = 1,
) -> ExpertsTime:
    """share: workers that share a device: each has so much less of it.

    A card takes, for each of its experts that has rows, the longer of reading the weights and of the products. Raises
    ConfigError when a device does not compute in this type.
    """
    params = expert_params(config)
    read_bytes = expert_bytes(config, dtype)
    rows_SE = draw_rows(layout.num_experts, config.experts_per_token, rows)
    seconds = workers = busy = 0.0
    for members, num_layers in _layer_kinds(layout).items():
        time_SW = np.zeros((NUM_DRAWS, len(members)))
        for index, (card, experts) in enumerate(members):
            device = layout.cards[card].device
            cost = costs[device.kind]
            held_SX = rows_SE[:, list(experts)]
            read = read_bytes / (device.bandwidth * cost.bandwidth) * share
            compute_SX = held_SX * (2 * params / (device.peak(dtype) * cost.flops) * share)
            work_S = np.where(held_SX > 0, np.maximum(read, compute_SX) + held_SX * (cost.per_row * share), 0.0).sum(
                axis=1
            )
            time_SW[:, index] = work_S + (work_S > 0) * cost.per_layer
        seconds += num_layers * float(time_SW.max(axis=1).mean())
        workers += num_layers * float((time_SW > 0).sum(axis=1).mean())
        busy += num_layers * float(time_SW.sum(axis=1).mean())
    return ExpertsTime(seconds, workers / layout.num_layers, busy)


@functools.lru_cache(maxsize=256)
def _layer_kinds(layout: Layout) -> dict[tuple[tuple[int, tuple[int, ...]], ...], int]:
    """((card, its experts), ...) of a layer, and how many layers are so."""
    kinds: Counter[tuple[tuple[int, tuple[int, ...]], ...]] = Counter()
    for layer in range(layout.num_layers):
        held = ((index, layout.held(card, layer)) for index, card in enumerate(layout.cards))
        kinds[tuple((index, experts) for index, experts in held if experts)] += 1
    return dict(kinds)
