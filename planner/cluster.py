"""A cluster as it is planned: what computes, how often, and how it is joined."""

from __future__ import annotations

import dataclasses

from grokmoe.model_config import ModelConfig
from planner.device import Device
from planner.layout import Card, Layout
from planner.model_size import expert_bytes, head_params, projection_params, weight_bytes


@dataclasses.dataclass(frozen=True)
class SharedHost:
    """One machine that all roles run on, as `grokmoe up` starts them: they share its cores and its memory.

    threads: of each expert worker; an attention worker and a fused process have one per core.
    """

    cores: int
    threads: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """model and the types of its weights; what computes it.

    layout: the cards of one copy of all experts. copies: of these. attention_workers: in all; routers: cells, each with
    an equal part of them. lanes: steps in flight per attention worker. link: bytes/s of a machine's network, each way;
    0: fused, all in one process. round_trip: seconds; None: that of the costs. kv_gib: of an attention worker. host:
    the one machine that all are on, which every device is then another name of; None: each has its own.
    has_router_inside: attention workers have their router in their own process, so no row of theirs is a message
    (`grokmoe serve --experts`). rows_by_pairs: rows go to experts from device to device, where the gate is computed.
    """

    config: ModelConfig
    dtype: str
    expert_dtype: str
    attention: Device
    attention_workers: int
    routers: int
    lanes: int
    layout: Layout
    copies: int
    link: float
    kv_gib: float
    router_price: float = 0.0
    round_trip: float | None = None
    host: SharedHost | None = None
    has_router_inside: bool = False
    rows_by_pairs: bool = False

    @property
    def is_fused(self) -> bool:
        """Whether router, attention and experts are one process."""
        return self.link == 0

    @property
    def num_cards(self) -> int:
        """Devices that compute experts."""
        return len(self.layout.cards) * self.copies

    @property
    def attention_working_set(self) -> float:
        """Bytes of weights that pass through an attention worker's caches before the same come again."""
        own = projection_params(self.config) * self.config.num_layers + head_params(self.config)
        return own * weight_bytes(self.dtype) + (self._all_experts if self._is_together else 0.0)

    def experts_working_set(self, card: Card) -> float:
        """The same of an expert worker's."""
        if self._is_together:
            return self.attention_working_set
        return (card.last - card.first) * expert_bytes(self.config, self.expert_dtype)

    def slowdown(self, rows: int) -> float:
        """By how much longer attention worker and router take for what they do between products, in a step with so
        many tokens: of one host the experts' weights pass through the caches, too."""
        if not self._is_together:
            return 1.0
        config = self.config
        touched = config.num_experts * (1 - (1 - config.experts_per_token / config.num_experts) ** rows)
        passing = touched * expert_bytes(config, self.expert_dtype) + projection_params(config) * weight_bytes(
            self.dtype
        )
        return self.attention.slowdown(passing)

    @property
    def _is_together(self) -> bool:
        return self.is_fused or self.host is not None

    @property
    def _all_experts(self) -> float:
        return self.config.num_experts * self.config.num_layers * expert_bytes(self.config, self.expert_dtype)

    @property
    def price(self) -> float:
        """Per hour."""
        cards = sum(card.device.price for card in self.layout.cards) * self.copies
        return cards + self.attention_workers * self.attention.price + self.routers * self.router_price
