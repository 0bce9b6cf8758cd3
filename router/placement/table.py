"""Who holds what, and which of them a call uses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from grokmoe.errors import ConfigError
from router.placement.ranges import ExpertLayers

NOBODY = -1
"""The worker of an expert that no ready worker holds."""


def check_held(num_layers: int, num_experts: int, name: str, held: Sequence[ExpertLayers]) -> None:
    """Raises ConfigError when a worker says that it holds what the model does not have."""
    for expert, begin, end in held:
        if not (0 <= expert < num_experts and 0 <= begin < end <= num_layers):
            raise ConfigError(
                f"{name} says it holds expert {expert} in layers {begin}-{end - 1}; the model "
                f"has {num_experts} experts and {num_layers} layers"
            )


@dataclasses.dataclass(frozen=True)
class Placement:
    """For every layer and expert the workers that hold it, in order of preference."""

    holders: tuple[tuple[tuple[int, ...], ...], ...]

    @classmethod
    def build(
        cls,
        num_layers: int,
        num_experts: int,
        held: Mapping[int, Sequence[ExpertLayers]],
        preferred: Mapping[int, Sequence[int]] | None = None,
        is_strict: bool = True,
    ) -> Placement:
        """Makes the table from what the workers say they hold.

        held: worker -> its experts and layers.
        preferred: expert -> workers to use, in this order; experts that are absent use every holder.
        is_strict: raise ConfigError naming layer and expert when nobody holds one, or a preferred worker does not.
        Otherwise such an expert has no holders, or those that are left: at run time workers come and go.
        Raises ConfigError in any case when the model has no such expert.
        """
        preferred = preferred or {}
        for expert in preferred:
            if not 0 <= expert < num_experts:
                raise ConfigError(f"placement names expert {expert}, the model has experts 0 to {num_experts - 1}")
        table: list[list[list[int]]] = [[[] for _ in range(num_experts)] for _ in range(num_layers)]
        for worker, ranges in sorted(held.items()):
            check_held(num_layers, num_experts, f"expert worker {worker}", ranges)
            for expert, begin, end in ranges:
                for layer in range(begin, end):
                    table[layer][expert].append(worker)
        for layer, row in enumerate(table):
            for expert, workers in enumerate(row):
                absent = [worker for worker in preferred.get(expert, ()) if worker not in workers]
                if absent and is_strict:
                    raise ConfigError(f"placement puts expert {expert} on worker {absent[0]}, which does not hold it")
                if expert in preferred and (is_strict or len(absent) < len(preferred[expert])):
                    row[expert] = workers = [worker for worker in preferred[expert] if worker not in absent]
                if not workers and is_strict:
                    raise ConfigError(f"no expert worker holds expert {expert} in layer {layer}")
        return cls(tuple(tuple(tuple(workers) for workers in row) for row in table))

    def choose(self, layer: int, load: Mapping[int, int], draw: Callable[[], float], turn: int = 0) -> list[int]:
        """Chooses one worker per expert for a call, NOBODY where none is ready.

        load: of the ready workers, the rows each has still to compute.
        draw: a random number from 0 to below 1.
        turn: grows by one from call to call of a layer.

        Power of two choices: the holder whose turn it is and one drawn from the others, of these the one with less
        load. The turn goes by expert and call, so that replicas share the experts of a call and the calls for an
        expert; two, because callers who all take the least loaded one overload it together.
        """
        chosen: list[int] = []
        for expert, workers in enumerate(self.holders[layer]):
            ready = [worker for worker in workers if worker in load]
            if not ready:
                chosen.append(NOBODY)
                continue
            first = (expert + turn) % len(ready)
            best = ready[first]
            if len(ready) > 1:
                other = ready[(first + 1 + int(draw() * (len(ready) - 1))) % len(ready)]
                best = other if load[other] < load[best] else best
            chosen.append(best)
        return chosen
