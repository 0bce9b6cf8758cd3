"""Whose turn the next step is while there are suspects.

A sequence that has lost its worker several times may be what kills workers. It is computed in steps of its own, with
nothing else in flight, in turn with the steps of all others, until it has drawn a token: if it is the one, nobody else
is counted among its victims again.

                      a suspect comes                 it had a step
      NO SUSPECTS ----------------> A SUSPECT'S TURN ----------------> THE OTHERS' TURN
                                      |  ^  comes when nothing               |
                                      |  |  is in flight                     |
         none of them can be computed +--+---- they had a step, or cannot ---+
         now: the others go on

From both turns back to NO SUSPECTS when none is left.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection

from router.scheduler.filling import Filling
from router.scheduler.roster import Roster
from router.sequence import Sequence
from router.step import Chunk, Step


class Turns:
    """Shares the steps of one worker between suspects and all others.

    has_suspects: false means that there are none for certain.
    """

    def __init__(self, roster: Roster, filling: Filling) -> None:
        self.has_suspects = False
        self._roster, self._filling = roster, filling
        self._was_alone = False  # the last step was a suspect's: the next one is for the others

    def note(self, sequence: Sequence) -> None:
        """A sequence has come."""
        self.has_suspects |= sequence.is_suspect

    def next_chunks(self, in_flight: Collection[Step]) -> list[Chunk]:
        """What the next step holds, beside the steps in flight; empty: nothing can be done now."""
        if any(map(_is_alone, in_flight)):
            return []
        if self.has_suspects:
            waiting_too = itertools.chain(self._roster.running, self._roster.waiting)
            self.has_suspects = any(each.is_suspect for each in waiting_too)
        if not self.has_suspects:
            return self._filling.fill(in_flight)
        if self._was_alone and (chunks := self._filling.fill(in_flight, is_suspect=False)):
            self._was_alone = False
            return chunks
        if in_flight:  # a suspect's turn comes when nobody else can be hurt
            return []
        chunks = self._filling.fill_for_one_suspect()
        self._was_alone = bool(chunks)
        if chunks:
            return chunks
        # Nobody is admitted while a suspect that is older waits for pages: it would wait for ever.
        waiting = self._roster.waiting
        is_passed = bool(waiting) and waiting.oldest.is_suspect
        return self._filling.fill(in_flight, is_suspect=False, admits=not is_passed)


def _is_alone(step: Step) -> bool:
    """Whether nothing else may be in flight beside it."""
    return len(step.chunks) == 1 and step.chunks[0].sequence.is_suspect
