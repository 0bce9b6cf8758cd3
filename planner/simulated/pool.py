"""The expert workers as one router knows them: the table of who holds what, and who is asked."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

from planner.simulated.expert_worker import SimulatedExpertWorker
from router.placement import NOBODY, ExpertLayers, Placement


class Pool:
    """workers: by index, those that this router reaches."""

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        workers: Mapping[int, SimulatedExpertWorker],
        held: Mapping[int, Sequence[ExpertLayers]],
        load: dict[int, int],
        seed: int,
    ) -> None:
        """load: by worker that is known to be there, its rows: what one router learns, all learn."""
        self.workers = workers
        self._placement = Placement.build(num_layers, num_experts, held)
        self._load = load
        self._turns = [0] * num_layers
        self._random = random.Random(seed)
        self._waiting: list[tuple[int, tuple[int, ...], Callable[[], None]]] = []

    def choose(self, layer: int) -> list[int]:
        """A worker for every expert, NOBODY where none is known to be there."""
        turn = self._turns[layer]
        self._turns[layer] += 1
        return self._placement.choose(layer, self._load, self._random.random, turn)

    def note_lost(self, index: int) -> None:
        """A call, or its connection, has shown that a worker is gone."""
        self._load.pop(index, None)

    def try_again(self) -> None:
        """A worker is back: whoever waited for one tries."""
        waiting, self._waiting = self._waiting, []
        for layer, experts, call in waiting:
            self.when_held(layer, experts, call)

    def when_held(self, layer: int, experts: tuple[int, ...], call: Callable[[], None]) -> None:
        """Calls as soon as each of these experts has a worker that is there."""
        chosen = self.choose(layer)
        if any(chosen[expert] == NOBODY for expert in experts):
            self._waiting.append((layer, experts, call))
        else:
            call()
