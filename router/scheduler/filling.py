"""What the next step holds: chunks of those that run, and of those that are admitted to it.

A step is filled in this order, within its budget of tokens (`step_budget`): decodes, then prefills begun earlier, then
admissions; within each the oldest first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from router.scheduler.roster import Roster
from router.scheduler.step_budget import StepBudget
from router.sequence import Sequence, SequenceState
from router.step import Chunk, SchedulerSettings, Step


class Filling:
    """Takes chunks from a roster, within the limits of a step."""

    def __init__(self, settings: SchedulerSettings, roster: Roster, budget: StepBudget) -> None:
        self._settings, self._roster, self._budget = settings, roster, budget

    def fill(self, in_flight: Iterable[Step], is_suspect: bool | None = None, admits: bool = True) -> list[Chunk]:
        """Chunks of a step for many, beside the steps in flight. is_suspect: of which sequences; None: there are no
        suspects."""
        roster, budget = self._roster, self._settings.max_step_tokens
        ready = [each for each in roster.running if not each.in_flight and is_suspect in (None, each.is_suspect)]
        decodes = [sequence for sequence in ready if sequence.num_to_compute == 1]
        prefills = [sequence for sequence in ready if sequence.num_to_compute > 1]
        num_preemptions = roster.num_preemptions
        chunks: list[Chunk] = []
        for sequence in decodes[: min(budget, self._lane_share(len(decodes), in_flight))]:
            if sequence.state is SequenceState.RUNNING and roster.extend(sequence):
                chunks.append(self._chunk(sequence, 1))
        budget = min(budget, self._budget.tokens(len(chunks))) - len(chunks)
        for sequence in prefills:
            if budget and sequence.state is SequenceState.RUNNING:
                chunks.append(self._chunk(sequence, budget))
                budget -= len(chunks[-1].token_ids)
        # Who was just preempted must not come back in the same step to take the pages it gave up.
        while (
            admits
            and budget
            and roster.num_preemptions == num_preemptions
            and (admitted := roster.admit_next(is_suspect))
        ):
            chunks.append(self._chunk(admitted, budget))
            budget -= len(chunks[-1].token_ids)
        return chunks

    def fill_for_one_suspect(self) -> list[Chunk]:
        """A chunk of the oldest suspect that can be computed now; empty: none can."""
        roster, num_preemptions = self._roster, self._roster.num_preemptions
        for sequence in [each for each in roster.running if each.is_suspect]:
            is_running = sequence.state is SequenceState.RUNNING  # unless an older one has just taken its pages
            if is_running and (sequence.num_to_compute > 1 or roster.extend(sequence)):
                return [self._chunk(sequence, self._settings.max_step_tokens)]
        if roster.num_preemptions == num_preemptions and (admitted := roster.admit_next(True)):
            return [self._chunk(admitted, self._settings.max_step_tokens)]
        return []

    def _lane_share(self, num_ready: int, in_flight: Iterable[Step]) -> int:
        """How many of the decodes that are ready the next step takes.

        With all decodes, ready or in flight, enough for n lanes, n steps share them. When n steps with decodes are
        in flight already, the others wait to join one of them: else a few decodes that once came out of step would
        read all weights for themselves for the rest of their lives.
        """
        flying = [step.num_decodes for step in in_flight if step.num_decodes]
        num_decodes = num_ready + sum(flying)
        num_shares = max(1, min(self._settings.num_lanes, num_decodes // self._settings.min_lane_rows))
        return 0 if len(flying) >= num_shares else math.ceil(num_decodes / num_shares)

    def _chunk(self, sequence: Sequence, budget: int) -> Chunk:
        """The next tokens of a sequence that holds the pages for them; marks it as in flight."""
        limit = self._settings.max_chunk_tokens or self._settings.max_step_tokens
        start = sequence.num_computed
        end = start + min(sequence.num_to_compute, budget, limit)
        sequence.in_flight = True
        return Chunk(
            sequence,
            start,
            token_ids=tuple(sequence.all_ids[start:end]),
            page_ids=sequence.page_ids[: self._roster.ledger.pages_for(end)],
            wants_token=end == sequence.num_tokens and sequence.request.max_tokens > 0,
        )
