"""Replicate, then pack, as DeepSeek's EPLB does for one layer: https://github.com/deepseek-ai/EPLB.

Spare places go to copies of the expert with the most load per copy; then copies go, heaviest first, to the worker
that is done first with them. Unlike there, workers may have different speeds and numbers of places.
"""

from __future__ import annotations

from collections.abc import Sequence

from router.rebalancing.layer import Layout


def replicate(load_E: Sequence[float], num_places: int, min_copies: int, max_copies: int) -> list[int]:
    """Copies of every expert: `min_copies`, and one more for the hottest until the places are used up."""
    copies = [min_copies] * len(load_E)
    for _ in range(num_places - sum(copies)):
        growing = [expert for expert, count in enumerate(copies) if count < max_copies]
        if not growing:
            break
        copies[max(growing, key=lambda expert: load_E[expert] / copies[expert])] += 1
    return copies


def pack(
    load_E: Sequence[float], copies_E: Sequence[int], places_W: Sequence[int], cost_W: Sequence[float]
) -> Layout | None:
    """Puts every copy on a worker, no two of one expert on the same. None: they do not fit."""
    held: list[set[int]] = [set() for _ in places_W]
    rows = [0.0] * len(places_W)
    copies = [(load_E[expert] / count, expert) for expert, count in enumerate(copies_E) for _ in range(count)]
    for load, expert in sorted(copies, key=lambda each: (-each[0], each[1])):
        open_ = [
            worker for worker in range(len(held)) if len(held[worker]) < places_W[worker] and expert not in held[worker]
        ]
        if open_:
            worker = min(open_, key=lambda each: (rows[each] + load) * cost_W[each])
        else:
            swapped = _make_room(held, expert, places_W)
            if swapped is None:
                return None
            worker, other, moved = swapped
            moved_load = load_E[moved] / copies_E[moved]
            rows[worker] -= moved_load
            rows[other] += moved_load
        held[worker].add(expert)
        rows[worker] += load
    return tuple(map(frozenset, held))


def _make_room(held: list[set[int]], expert: int, places_W: Sequence[int]) -> tuple[int, int, int] | None:
    """Who has a place left holds the expert already: somebody else moves one of its own there.

    Returns who has room now, who took the other expert, and that expert.
    """
    for other, others in enumerate(held):
        if len(others) >= places_W[other]:
            continue
        for worker, mine in enumerate(held):
            if expert not in mine and (movable := mine - others):
                moved = min(movable)
                mine.remove(moved)
                others.add(moved)
                return worker, other, moved
    return None
