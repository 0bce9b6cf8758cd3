"""Sequences in the order in which they came."""

from __future__ import annotations

import bisect
from collections.abc import Iterator

from router.fair_share import Place
from router.sequence import Sequence


def _arrival_of(sequence: Sequence) -> Place:
    return sequence.arrival


class SequenceQueue:
    """Sequences in order of arrival, oldest first.

    A sorted list. A new arrival is appended; what comes back after preemption finds its old place. Taking out the
    first of thousands moves their pointers in one memmove, a microsecond or two.
    """

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    def __reversed__(self) -> Iterator[Sequence]:
        return reversed(self._sequences)

    @property
    def oldest(self) -> Sequence:
        """The first. The queue is not empty."""
        return self._sequences[0]

    def add(self, sequence: Sequence) -> None:
        """Puts a sequence in its place."""
        index = self._find(sequence)
        assert index == len(self) or self._sequences[index].arrival != sequence.arrival, "arrival is not unique"
        self._sequences.insert(index, sequence)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it stands."""
        index = self._find(sequence)
        assert self._sequences[index : index + 1] == [sequence], f"not in the queue: {sequence}"
        del self._sequences[index]

    def clear(self) -> None:
        """Takes all out."""
        self._sequences.clear()

    def _find(self, sequence: Sequence) -> int:
        return bisect.bisect_left(self._sequences, sequence.arrival, key=_arrival_of)
