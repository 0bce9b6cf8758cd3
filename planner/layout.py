"""Which card of a copy holds which experts of which layers.

A copy is a set of cards that together hold every expert of every layer once. Pairs are (expert, layer), counted expert
by expert: pair number p is layer p % L of expert p // L. A card holds a run of consecutive pairs, so experts stay whole
where they can, and where they cannot, they are cut between layers. Runs are as long as their cards are fast, as far as
they have room.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from grokmoe.errors import ConfigError
from planner.device import Device


@dataclasses.dataclass(frozen=True)
class Card:
    """One card of a copy, with its run of pairs, the last one excluded."""

    device: Device
    first: int
    last: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """A copy."""

    cards: tuple[Card, ...]
    num_experts: int
    num_layers: int

    def held(self, card: Card, layer: int) -> tuple[int, ...]:
        """The experts of a card in a layer."""
        return tuple(
            expert for expert in range(self.num_experts) if card.first <= expert * self.num_layers + layer < card.last
        )

    def spec(self, card: Card) -> str:
        """A card's run in the words of an expert worker's settings, such as `0-1+2@0-31`."""
        layers = self.num_layers
        first_whole, end_whole = -(-card.first // layers), card.last // layers
        if first_whole > end_whole:  # inside one expert
            return f"{card.first // layers}@{_span(card.first % layers, card.last % layers)}"
        parts = []
        if card.first % layers:
            parts.append(f"{card.first // layers}@{_span(card.first % layers, layers)}")
        if first_whole < end_whole:
            parts.append(_span(first_whole, end_whole))
        if card.last % layers:
            parts.append(f"{card.last // layers}@{_span(0, card.last % layers)}")
        return "+".join(parts)


def _span(begin: int, end: int) -> str:
    return str(begin) if end == begin + 1 else f"{begin}-{end - 1}"


def lay_out(devices: Sequence[Device], rooms: Sequence[int], num_experts: int, num_layers: int) -> Layout:
    """Gives every card its run. rooms: most pairs of each. Raises ConfigError when they are too few."""
    num_pairs = num_experts * num_layers
    if sum(rooms) < num_pairs:
        raise ConfigError(
            f"{len(devices)} cards hold {sum(rooms)} of the {num_pairs} (expert, layer) pairs: too little memory"
        )
    shares = fill([device.bandwidth for device in devices], rooms, num_pairs)
    cards, begin, exact = [], 0, 0.0
    for device, share, room in zip(devices, shares, rooms, strict=True):
        exact += share
        end = min(round(exact), begin + room)
        cards.append(Card(device, begin, end))
        begin = end
    # What rounding has left goes where there is room.
    missing = num_pairs - begin
    if missing:
        lengths = [card.last - card.first for card in cards]
        for index, room in enumerate(rooms):
            more = min(missing, room - lengths[index])
            lengths[index] += more
            missing -= more
        cards, begin = [], 0
        for device, length in zip(devices, lengths, strict=True):
            cards.append(Card(device, begin, begin + length))
            begin += length
    return Layout(tuple(card for card in cards if card.last > card.first), num_experts, num_layers)


def fill(speeds: Sequence[float], rooms: Sequence[int], total: float) -> list[float]:
    """Shares of `total` in proportion to the speeds, none above its room; what is above goes to the others."""
    shares = [0.0] * len(speeds)
    open_ = list(range(len(speeds)))
    left = total
    while open_ and left > 0:
        unit = left / sum(speeds[index] for index in open_)
        full = [index for index in open_ if speeds[index] * unit >= rooms[index]]
        if not full:
            for index in open_:
                shares[index] = speeds[index] * unit
            break
        for index in full:
            shares[index] = float(rooms[index])
            left -= rooms[index]
            open_.remove(index)
    return shares
