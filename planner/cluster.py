"""A cluster as it is planned: what computes, how often, and how it is joined."""

from __future__ import annotations

import dataclasses

from grokmoe.model_config import ModelConfig
from planner.device import Device
from planner.layout import Layout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """model and the types of its weights; what computes it.

    layout: the cards of one copy of all experts. copies: of these. attention_workers: in all; routers: cells, each with
    an equal part of them. lanes: steps in flight per attention worker. link: bytes/s of a machine's network, each way;
    0: fused, all in one process. experts_share: workers of one copy that share a device, each with an equal part of it.
    round_trip: seconds; None: that of the costs. kv_gib: of an attention worker.
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
    experts_share: int = 1

    @property
    def is_fused(self) -> bool:
        """Whether router, attention and experts are one process."""
        return self.link == 0

    @property
    def num_cards(self) -> int:
        """Devices that compute experts."""
        return len(self.layout.cards) * self.copies

    @property
    def price(self) -> float:
        """Per hour."""
        cards = sum(card.device.price for card in self.layout.cards) * self.copies
        return cards + self.attention_workers * self.attention.price + self.routers * self.router_price
