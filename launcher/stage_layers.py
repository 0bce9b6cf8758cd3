"""Which layers each stage of a pipeline of attention workers gets. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from attention_worker.config import ALL, parse_layers
from grokmoe.errors import ConfigError


def stage_layers(num_layers: int, num_stages: int, given: Sequence[str] = ()) -> tuple[str, ...]:
    """What each stage is started with as `--layers`, in their order; one stage has all.

    given: the layers of each stage; empty: as even as can be. The last stages are the shorter ones: the last of all has
    the head beside its layers.
    Raises ConfigError for more stages than layers, and for layers that do not follow one another from first to last.
    """
    if given:
        return _check_given(num_layers, num_stages, given)
    if not 1 <= num_stages <= num_layers:
        raise ConfigError(f"pipeline_stages is {num_stages}, must be from 1 to {num_layers}, the model's layers")
    if num_stages == 1:
        return (ALL,)
    length, num_longer = divmod(num_layers, num_stages)
    begins = [number * length + min(number, num_longer) for number in range(num_stages + 1)]
    return tuple(f"{begin}-{end - 1}" for begin, end in itertools.pairwise(begins))


def _check_given(num_layers: int, num_stages: int, given: Sequence[str]) -> tuple[str, ...]:
    text = ",".join(given)
    if num_stages not in (1, len(given)):
        raise ConfigError(f"pipeline_stages is {num_stages}, stage_layers {text} names {len(given)}")
    begin = 0
    for spec in given:
        held = parse_layers(spec, num_layers)
        if held.start != begin:
            raise ConfigError(f"stage_layers is {text}: {spec} must begin with layer {begin}")
        begin = held.stop
    if begin != num_layers:
        raise ConfigError(f"stage_layers is {text}: must end with layer {num_layers - 1}, the model's last")
    return tuple(given)
