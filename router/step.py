"""One step as the scheduler plans it, and the limits it plans within."""

from __future__ import annotations

import dataclasses
import functools
import math

from grokmoe.errors import ConfigError
from router.sequence import FinishReason, Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class SchedulerSettings:
    """Limits and sizes. ConfigError names the one that cannot be."""

    context_length: int
    """Most tokens of a sequence, prompt and output together: the model's."""
    max_step_tokens: int = 2048
    """Tokens computed in one step, over all its sequences."""
    max_running: int = 256
    """Sequences that hold pages at the same time."""
    max_chunk_tokens: int | None = None
    """Tokens of one sequence in one step; None: `max_step_tokens`."""
    num_lanes: int = 1
    """Steps in flight at the same time."""
    min_lane_rows: int = 16
    """Decodes are split over lanes only if each gets this many: a smaller part reads the same weights for less."""
    step_goal: float = 0.0
    """Seconds that a step with decodes may take: prompts beside them are cut so (`scheduler.step_budget`); 0: any."""
    admission_watermark: float = 0.01
    """Part of the pages that admission leaves to the decodes of running sequences, so that they are not preempted
    at once."""

    def __post_init__(self) -> None:
        for name in ("context_length", "max_step_tokens", "max_running", "num_lanes", "min_lane_rows"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, must be at least 1")
        if self.max_chunk_tokens is not None and self.max_chunk_tokens < 1:
            raise ConfigError(f"max_chunk_tokens is {self.max_chunk_tokens}, must be at least 1 or None")
        if not 0 <= self.step_goal < math.inf:
            raise ConfigError(f"step_goal is {self.step_goal}, must be finite and at least 0")
        if not 0 <= self.admission_watermark < 1:
            raise ConfigError(f"admission_watermark is {self.admission_watermark}, must be in [0, 1)")


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Chunk:
    """Consecutive tokens of one sequence in a step, at positions `start`, `start + 1`, ...

    `page_ids` are the pages of positions 0 to the chunk's end. `wants_token`: the last token's successor is drawn.
    """

    sequence: Sequence
    start: int
    token_ids: tuple[int, ...]
    page_ids: tuple[int, ...]
    wants_token: bool

    @property
    def end(self) -> int:
        """One past the last position."""
        return self.start + len(self.token_ids)


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """Chunks of different sequences, computed together. Given back once: to `complete` or to `fail`."""

    chunks: tuple[Chunk, ...]

    @property
    def request_ids(self) -> list[str]:
        """Of all requests that take part, sorted."""
        return sorted({chunk.sequence.request.request_id for chunk in self.chunks})

    @functools.cached_property
    def num_tokens(self) -> int:
        """Tokens computed."""
        return sum(len(chunk.token_ids) for chunk in self.chunks)

    @functools.cached_property
    def num_decodes(self) -> int:
        """Chunks of one token that draw the next."""
        return sum(chunk.wants_token and len(chunk.token_ids) == 1 for chunk in self.chunks)


@dataclasses.dataclass(frozen=True, slots=True)
class Drawn:
    """What one sequence got from a step: a token (None: it wanted none and is over), and why it ended if it did."""

    sequence: Sequence
    token_id: int | None
    finish_reason: FinishReason | None
