"""Who holds what, and which of them a call uses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence

from grokmoe.errors import ConfigError
from grokmoe.expert_ranges import ExpertLayers
from grokmoe.expert_units import check_slicing, describe_unit, expert_of, num_slices_of, units_of
from grokmoe.model_config import ModelConfig
from router.placement.slicing import Slicings, choose_slicing, is_complete, slicings_of

NOBODY = -1
"""The worker of a unit that no ready worker holds."""

Choice = dict[int, int]
"""Of one layer, ascending: unit -> the worker that a call uses, or NOBODY. All experts are there, whole or cut."""


def check_held(config: ModelConfig, name: str, held: Sequence[ExpertLayers]) -> None:
    """Raises ConfigError when a worker says that it holds what the model does not have."""
    for unit, begin, end in held:
        expert, num_slices = expert_of(unit), num_slices_of(unit)
        if not (0 <= expert < config.num_experts and 0 <= begin < end <= config.num_layers):
            raise ConfigError(
                f"{name} says it holds expert {expert} in layers {begin}-{end - 1}; the model "
                f"has {config.num_experts} experts and {config.num_layers} layers"
            )
        what = f"{name} says it holds slices of expert {expert}: their number"
        check_slicing(what, num_slices, config.intermediate_size)


@dataclasses.dataclass(frozen=True)
class Placement:
    """For every layer and unit the workers that hold it, in order of preference.

    holders: of each layer what is used, ascending. slicings: of each layer the experts that are held in more than one
    number of slices, and all of these.
    """

    holders: tuple[Mapping[int, tuple[int, ...]], ...]
    slicings: tuple[Mapping[int, Slicings], ...]

    @classmethod
    def build(
        cls,
        num_layers: int,
        num_experts: int,
        held: Mapping[int, Sequence[ExpertLayers]],
        preferred: Mapping[int, Sequence[int]] | None = None,
        ready: Collection[int] | None = None,
    ) -> Placement:
        """Makes the table from what the workers say they hold.

        held: worker -> its units and layers, as `check_held` lets them pass.
        preferred: unit -> workers to use, in this order; units that are absent use every holder.
        ready: those of the workers that are in use, by whom it is decided in how many slices an expert is used. At run
        time workers come and go, so a unit may have no holders, or those of the preferred ones that are left. None: all
        of them, and nothing may be missing: ConfigError, naming layer and unit, when nobody holds one, or a preferred
        worker does not.
        """
        preferred, is_strict = preferred or {}, ready is None
        num_preferred = {expert_of(unit): num_slices_of(unit) for unit in preferred}
        for expert in num_preferred:
            if not 0 <= expert < num_experts:
                raise ConfigError(f"placement names expert {expert}, the model has experts 0 to {num_experts - 1}")
        table: list[dict[int, list[int]]] = [{} for _ in range(num_layers)]
        for worker, ranges in sorted(held.items()):
            for unit, begin, end in ranges:
                for layer in range(begin, end):
                    table[layer].setdefault(unit, []).append(worker)
        holders: list[Mapping[int, tuple[int, ...]]] = []
        several: list[Mapping[int, Slicings]] = []
        for row in table:
            for unit, wanted in preferred.items():
                row[unit] = _ordered(unit, row.get(unit, []), wanted, is_strict)
            slicings = slicings_of(row)
            used: dict[int, tuple[int, ...]] = {}
            for expert in range(num_experts):
                of_expert = slicings.get(expert, {1: [()]})
                num_slices = next(iter(of_expert))
                if len(of_expert) > 1:
                    num_slices = choose_slicing(of_expert, held if ready is None else ready, num_preferred.get(expert))
                used.update(zip(units_of(expert, num_slices), map(tuple, of_expert[num_slices]), strict=True))
            holders.append(dict(sorted(used.items())))
            several.append({expert: of_expert for expert, of_expert in slicings.items() if len(of_expert) > 1})
        placement = cls(tuple(holders), tuple(several))
        if is_strict:
            placement.check_complete()
        return placement

    def check_complete(self) -> None:
        """Raises ConfigError, naming layer and unit, when nobody holds one."""
        for layer, row in enumerate(self.holders):
            for unit, workers in row.items():
                if not workers:
                    raise ConfigError(f"no expert worker holds expert {describe_unit(unit)} in layer {layer}")

    def choose(self, layer: int, load: Mapping[int, int], draw: Callable[[], float], turn: int = 0) -> Choice:
        """Chooses one worker per unit for a call, NOBODY where none is ready.

        load: of the ready workers, the rows each has still to compute.
        draw: a random number from 0 to below 1.
        turn: grows by one from call to call of a layer.

        Power of two choices: the holder whose turn it is and one drawn from the others, of these the one with less
        load. The turn goes by unit and call, so that replicas share the units of a call and the calls for a unit; two,
        because callers who all take the least loaded one overload it together.
        """
        chosen: Choice = {}
        for place, (unit, workers) in enumerate(self.holders[layer].items()):
            ready = [worker for worker in workers if worker in load]
            if not ready:
                chosen[unit] = NOBODY
                continue
            first = (place + turn) % len(ready)
            best = ready[first]
            if len(ready) > 1:
                other = ready[(first + 1 + int(draw() * (len(ready) - 1))) % len(ready)]
                best = other if load[other] < load[best] else best
            chosen[unit] = best
        return chosen

    def can_serve(self, layer: int, unit: int, workers: Collection[int]) -> bool:
        """Whether these workers can do without any other, be it with the expert cut otherwise than it is now."""
        if any(holder in workers for holder in self.holders[layer].get(unit, ())):
            return True
        others = self.slicings[layer].get(expert_of(unit), {})
        return any(is_complete(slices, workers) for slices in others.values())


def _ordered(unit: int, holders: Sequence[int], wanted: Sequence[int], is_strict: bool) -> list[int]:
    """Those of the holders that are wanted, in that order; all of them when none is, except when strict."""
    absent = [worker for worker in wanted if worker not in holders]
    if absent and is_strict:
        raise ConfigError(f"placement puts expert {describe_unit(unit)} on worker {absent[0]}, which does not hold it")
    if is_strict or len(absent) < len(wanted):
        return [worker for worker in wanted if worker not in absent]
    return list(holders)
