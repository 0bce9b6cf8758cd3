"""How long the experts of one step take: layer by layer the slowest card, averaged over draws of the routing.

    a card      o + sum over its experts with rows of  c + rows r + the longer of
                bytes / (bandwidth e_b) and 2 weights max(rows, tile) / (flops e_f)

Workers of one host share it. Each has so many threads and no more, so its products take longer; and all together take
no less than their bytes at the host's bandwidth, nor than their threads' time over the host's cores.

Letters: S draws, E experts, X experts of a card, W cards. Which experts a token goes to is taken for random and even.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter

import numpy as np
import numpy.typing as npt

from planner.cluster import Cluster
from planner.costs import ExpertCosts
from planner.layout import Card, Layout
from planner.model_size import expert_bytes, expert_params

NUM_DRAWS = 64
"""Draws of the routing: the mean of a maximum is then known to a few percent."""

EXACT_ROWS = 64
"""Rows up to which each row's experts are drawn without repetition; above it, numbers of rows are."""

Floats = npt.NDArray[np.float64]


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


@dataclasses.dataclass(frozen=True)
class ExpertWork:
    """What an expert of one layer takes on a card: seconds of reading it, of products per row, per row beside them, and
    of its call. tile: rows at least."""

    read: float
    per_product_row: float
    per_row: float
    call: float
    tile: float

    def seconds(self, rows: npt.NDArray[np.int64]) -> Floats:
        """Of experts with so many rows."""
        products = np.maximum(rows, self.tile) * self.per_product_row
        work: Floats = np.where(rows > 0, np.maximum(self.read, products) + rows * self.per_row + self.call, 0.0)
        return work

    def seconds_of(self, rows: int) -> float:
        """Of one expert, which has rows."""
        return max(self.read, max(rows, self.tile) * self.per_product_row) + rows * self.per_row + self.call


def expert_work(cluster: Cluster, cost: ExpertCosts, card: Card) -> ExpertWork:
    """Raises ConfigError when the card does not compute in this type."""
    config, dtype, device = cluster.config, cluster.expert_dtype, card.device
    slower = 1.0 if cluster.host is None else cluster.host.cores / cluster.host.threads
    elements = config.hidden_size + config.intermediate_size
    return ExpertWork(
        read=expert_bytes(config, dtype) / (device.read_rate(cluster.experts_working_set(card)) * cost.bandwidth),
        per_product_row=2 * expert_params(config) / (device.peak(dtype) * cost.flops) * slower,
        per_row=elements * cost.per_element / device.parallel * slower,
        call=cost.per_expert,
        tile=cost.tile_rows,
    )


def experts_time(cluster: Cluster, costs: dict[str, ExpertCosts], rows: int) -> ExpertsTime:
    """Of a step with so many tokens."""
    layout, host = cluster.layout, cluster.host
    rows_SE = draw_rows(layout.num_experts, cluster.config.experts_per_token, rows)
    seconds = workers = busy = 0.0
    for members, num_layers in _layer_kinds(layout).items():
        time_SW = np.zeros((NUM_DRAWS, len(members)))
        read_S = np.zeros(NUM_DRAWS)
        for index, (card, experts) in enumerate(members):
            cost = costs[layout.cards[card].device.kind]
            work = expert_work(cluster, cost, layout.cards[card])
            held_SX = rows_SE[:, list(experts)]
            work_S = work.seconds(held_SX).sum(axis=1)
            time_SW[:, index] = work_S + (work_S > 0) * cost.per_layer
            read_S += (held_SX > 0).sum(axis=1) * work.read
        slowest_S = time_SW.max(axis=1)
        if host is not None:
            threads_S = time_SW.sum(axis=1) * host.threads / host.cores
            slowest_S = np.maximum(slowest_S, np.maximum(read_S, threads_S))
        seconds += num_layers * float(slowest_S.mean())
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
