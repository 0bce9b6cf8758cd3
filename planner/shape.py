"""What one step computes, as far as its time depends on it."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Sequence


@dataclasses.dataclass(frozen=True, order=True)
class StepShape:
    """rows: tokens computed. sequences: whose they are. draws: tokens drawn. attended: positions that rows attend to,
    summed over rows. read: positions whose keys and values are read, summed over sequences."""

    rows: int
    sequences: int
    draws: int
    attended: float
    read: float


def of_chunks(chunks: Iterable[tuple[int, int, bool]]) -> StepShape:
    """The shape of (first position, one past the last, whether a token is drawn) of each chunk."""
    rows = sequences = draws = 0
    attended = read = 0.0
    for start, end, wants_token in chunks:
        rows += end - start
        sequences += 1
        draws += wants_token
        attended += (end - start) * (start + end + 1) / 2
        read += end
    return StepShape(rows, sequences, draws, attended, read)


def decode(batch: int, context: float) -> StepShape:
    """Every sequence one token further, at a mean context."""
    return StepShape(batch, batch, batch, batch * context, batch * context)


def prefill(tokens: int, start: int = 0, draws: int = 1) -> StepShape:
    """One sequence's tokens from a position on."""
    return dataclasses.replace(of_chunks([(start, start + tokens, True)]), draws=draws)


def mean_shape(shapes: Sequence[StepShape]) -> StepShape:
    """A step like all of these."""
    means = [statistics.fmean(values) for values in zip(*map(dataclasses.astuple, shapes), strict=True)]
    rows, sequences, draws = (max(1, round(value)) for value in means[:3])
    return StepShape(rows, sequences, draws, *means[3:])
