"""Which rows of a step need logits, and where each chunk finds its own among them. Pure bookkeeping.

Letters: R rows of logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from grokmoe.step_plan import LogitsScope, SequenceChunk


@dataclass(frozen=True, slots=True)
class ChunkRows:
    """One chunk's rows among the rows of logits.

    returned: those whose logits are returned.
    scored: those whose successors are judged.
    last: the one from which a token is drawn; None: none.
    """

    returned: range
    scored: range
    last: int | None


@dataclass(frozen=True, slots=True)
class LogitRows:
    """step_rows_R: the rows of the step that need logits, ascending. chunks: per chunk its own among these."""

    step_rows_R: tuple[int, ...]
    chunks: tuple[ChunkRows, ...]

    @classmethod
    def of(cls, chunks: Sequence[SequenceChunk]) -> LogitRows:
        """Only what somebody asks for."""
        step_rows: list[int] = []
        found, begin = [], 0
        for chunk in chunks:
            num_tokens, first, scoring = len(chunk.token_ids), len(step_rows), chunk.scoring
            scored = range(0) if scoring is None else range(scoring.first, scoring.first + len(scoring.target_ids))
            if chunk.logits is LogitsScope.ALL:
                needed, returned = range(num_tokens), range(first, first + num_tokens)
            else:
                needed, returned = scored, range(0)
            step_rows.extend(range(begin + needed.start, begin + needed.stop))
            scored = range(first + scored.start - needed.start, first + scored.stop - needed.start)
            last = None
            if chunk.sampling is not None:
                if needed.stop != num_tokens:
                    step_rows.append(begin + num_tokens - 1)
                last = len(step_rows) - 1
            found.append(ChunkRows(returned, scored if scoring is not None else range(0), last))
            begin += num_tokens
        return cls(tuple(step_rows), tuple(found))
