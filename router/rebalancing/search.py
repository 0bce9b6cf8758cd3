"""Small improvements of one layer, one after the other, each of which relieves the busiest worker."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from router.rebalancing.layer import Layout, copies_of, times

MAX_CHANGES = 32
"""Improvements per layer; each helps less than the one before."""

MIN_GAIN = 1e-6
"""Share of the peak that a change must save, so that rounding is no improvement."""

_Change = tuple[tuple[int, int, bool], ...]
"""(worker, expert, whether it gets it or gives it up)."""


def improve(
    layout: Layout,
    load_E: Sequence[float],
    places_W: Sequence[int],
    cost_W: Sequence[float],
    max_changes: int = MAX_CHANGES,
) -> Layout:
    """Gives the busiest worker's experts away, exchanges or copies them, while that makes the layer faster.

    Never gives up a copy without making another one, so every expert keeps its number of holders at least.
    """
    held = [set(experts) for experts in layout]
    for _ in range(max_changes):
        now = times(held, load_E, cost_W)
        busiest = max(range(len(held)), key=now.__getitem__)
        copies = copies_of(held, len(load_E))
        best, best_key = None, _key(now, busiest, now[busiest])
        for change in _changes(held, busiest, places_W):
            after = _times_after(held, now, copies, change, load_E, cost_W)
            top = max(after)
            key = _key(after, busiest, top)
            if key < best_key and (top < now[busiest] * (1 - MIN_GAIN) or key[1] < best_key[1]):
                best, best_key = change, key
        if best is None:
            break
        for worker, expert, gets in best:
            (held[worker].add if gets else held[worker].discard)(expert)
    return tuple(map(frozenset, held))


def _key(now: Sequence[float], busiest: int, top: float) -> tuple[float, int]:
    """Less is better: the peak, then how many workers are at it."""
    return top, sum(1 for each in now if each >= top * (1 - MIN_GAIN))


def _changes(held: list[set[int]], busiest: int, places_W: Sequence[int]) -> Iterator[_Change]:
    for expert in sorted(held[busiest]):
        for other, theirs in enumerate(held):
            if other == busiest or expert in theirs:
                continue
            if len(theirs) < places_W[other]:
                yield (busiest, expert, False), (other, expert, True)
                yield ((other, expert, True),)
            for back in sorted(theirs - held[busiest]):
                yield (busiest, expert, False), (other, expert, True), (other, back, False), (busiest, back, True)


def _times_after(
    held: list[set[int]],
    now: Sequence[float],
    copies: Sequence[int],
    change: _Change,
    load_E: Sequence[float],
    cost_W: Sequence[float],
) -> list[float]:
    after = list(now)
    if len(change) == 1:  # one copy more: every holder gets less
        ((worker, expert, _),) = change
        before, then = load_E[expert] / copies[expert], load_E[expert] / (copies[expert] + 1)
        for each, mine in enumerate(held):
            if expert in mine:
                after[each] -= (before - then) * cost_W[each]
        after[worker] += then * cost_W[worker]
        return after
    for worker, expert, gets in change:
        after[worker] += (1 if gets else -1) * load_E[expert] / copies[expert] * cost_W[worker]
    return after
