"""The requests that are alive: by id, by sequence, and in which cell each of their sequences is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from router.cell import AttentionCell
from router.generation import Generation
from router.sequence import Sequence


class Register:
    """A request is in here from `add` until the last of its sequences is forgotten; its id is taken as long."""

    def __init__(self) -> None:
        self._by_id: dict[str, Generation] = {}
        self._generations: dict[Sequence, Generation] = {}
        self._cell_of: dict[Sequence, AttentionCell] = {}

    @property
    def num_sequences(self) -> int:
        """Those alive."""
        return len(self._generations)

    @property
    def generations(self) -> list[Generation]:
        """Those alive, oldest first."""
        return list(self._by_id.values())

    @property
    def num_with_adapter(self) -> Counter[str]:
        """Sequences alive by the id of their adapter, those without one left out."""
        return Counter(each.request.adapter_id for each in self._generations if each.request.adapter_id)

    def find(self, request_id: str) -> Generation | None:
        """The request of that id."""
        return self._by_id.get(request_id)

    def generation_of(self, sequence: Sequence) -> Generation | None:
        """The request of a sequence; None if the sequence is over."""
        return self._generations.get(sequence)

    def cell_of(self, sequence: Sequence) -> AttentionCell | None:
        """Where a sequence is; None if it is over."""
        return self._cell_of.get(sequence)

    def sequences_of(self, cell: AttentionCell) -> list[Sequence]:
        """All that are in a cell."""
        return [sequence for sequence, its in self._cell_of.items() if its is cell]

    def add(self, generation: Generation) -> None:
        """A request has come; `put` its sequences in cells."""
        self._by_id[generation.request.request_id] = generation

    def put(self, generation: Generation, sequence: Sequence, cell: AttentionCell) -> None:
        """A sequence of a request is in a cell."""
        self._generations[sequence], self._cell_of[sequence] = generation, cell

    def move(self, sequence: Sequence, cell: AttentionCell) -> None:
        """A sequence is in another cell."""
        self._cell_of[sequence] = cell

    def forget(self, sequence: Sequence) -> Generation | None:
        """A sequence is over. Returns its request; None if it was forgotten before."""
        self._cell_of.pop(sequence, None)
        generation = self._generations.pop(sequence, None)
        # The id is free once no candidate lives, also if the client has not taken the last tokens yet.
        if generation and not any(other in self._generations for other in generation.sequences):
            del self._by_id[generation.request.request_id]
        return generation

    def check(self, cells: Iterable[AttentionCell]) -> None:
        """Asserts that every sequence has its request and one of these cells, and back."""
        assert self._generations.keys() == self._cell_of.keys(), "a request without a cell"
        assert {id(each) for each in self._generations.values()} == {id(each) for each in self._by_id.values()}
        for sequence, cell in self._cell_of.items():
            assert not sequence.is_over, f"is over and still kept: {sequence}"
            assert cell in cells, f"in a cell that has left: {sequence}"
