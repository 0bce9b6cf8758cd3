"""Pipelines of tiny-a: links to stages that hold some of its three layers."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from router.transport.pipeline import PipelineLink
from tests.router.faulty_attention import Fault, FaultyAttention

SPLITS = [(0, 1, 2, 3), (0, 1, 3), (0, 2, 3)]
"""Where its layers are cut: three stages, and two uneven ones."""


def faulty_stages(
    cuts: Sequence[int], faults: Mapping[int, Mapping[int, Fault]] | None = None, name: str = "", **sizes: int
) -> list[FaultyAttention]:
    """faults: number of a stage -> its faults. Stages are called by `name` and a letter."""
    faults = faults or {}
    return [
        FaultyAttention(faults.get(number), address=f"{name}{'abc'[number]}", held=range(begin, end), **sizes)
        for number, (begin, end) in enumerate(itertools.pairwise(cuts))
    ]


def pipeline(*stages: FaultyAttention) -> PipelineLink:
    """Named the wrong way round: their order is found by asking."""
    return PipelineLink(stages[::-1])
