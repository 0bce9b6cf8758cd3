"""Who computes what next on one attention worker: the steps, from the moment they are given out until they are back.

The engine's loop per lane is three statements: `step = scheduler.schedule()`, run it, and
`scheduler.complete(step, tokens)` or `scheduler.fail(step)`. Each lane has one step in flight; any may end first.
Nothing here waits or sends.

    schedule ---> in flight ---complete---> its tokens are the sequences', its full pages known
                      |
                      +---fail, drain_all---> its sequences wait to be recomputed
"""

from __future__ import annotations

from collections.abc import Callable, Container
from collections.abc import Sequence as Listed

from grokmoe.errors import InvalidRequest, Reason
from router.pages import PageLedger
from router.request import Request
from router.scheduler.filling import Filling
from router.scheduler.roster import Roster
from router.scheduler.step_budget import StepBudget
from router.scheduler.turns import Turns
from router.sequence import FinishReason, Sequence, SequenceState
from router.step import Chunk, Drawn, SchedulerSettings, Step


class Scheduler:
    """Decides for one attention worker: nobody else changes its sequences or its ledger."""

    def __init__(self, settings: SchedulerSettings, ledger: PageLedger) -> None:
        self.settings = settings
        self.ledger = ledger
        self._roster = Roster(settings, ledger)
        self.budget = StepBudget(settings.step_goal, settings.max_step_tokens)
        self._turns = Turns(self._roster, Filling(settings, self._roster, self.budget))
        self._in_flight: dict[Step, None] = {}

    @property
    def num_waiting(self) -> int:
        """Sequences without pages."""
        return len(self._roster.waiting)

    @property
    def num_waiting_tokens(self) -> int:
        """Tokens of those."""
        return sum(sequence.num_tokens for sequence in self._roster.waiting)

    @property
    def num_running(self) -> int:
        """Sequences with pages, cancelled ones not counted."""
        return len(self._roster.running)

    @property
    def num_in_flight(self) -> int:
        """Steps given out and not back yet."""
        return len(self._in_flight)

    @property
    def room(self) -> int:
        """Sequences more that would take part in steps at once; 0 while there are not enough pages for those that are
        here."""
        if self.is_short and self.num_waiting:
            return 0
        return max(0, self.settings.max_running - self.num_running - self.num_waiting)

    @property
    def is_short(self) -> bool:
        """Whether the last sequence that was to be admitted found no pages."""
        return self._roster.is_short

    @property
    def num_preemptions(self) -> int:
        """Sequences preempted for want of pages."""
        return self._roster.num_preemptions

    @property
    def prefix_queries_tokens(self) -> int:
        """Tokens looked up in the prefix cache; not those that are recomputed."""
        return self._roster.prefix_queries_tokens

    @property
    def prefix_hits_tokens(self) -> int:
        """Of those, tokens found."""
        return self._roster.prefix_hits_tokens

    @property
    def max_sequence_tokens(self) -> int:
        """Most tokens, prompt and output, of a sequence that can be served here."""
        # The last token is sent to the client and never computed: it needs no page.
        return min(self.settings.context_length, self.ledger.num_pages * self.ledger.page_size + 1)

    def fits(self, num_tokens: int) -> bool:
        """Whether a sequence of so many tokens (prompt + max_tokens) can be served here, alone if need be."""
        return min(num_tokens, self.settings.context_length) <= self.max_sequence_tokens

    def check_fits(self, request: Request) -> None:
        """Raises InvalidRequest when the request could never be served, were it alone."""
        num_prompt, max_tokens = len(request.prompt_ids), request.max_tokens
        if num_prompt >= self.settings.context_length:
            limit = self.settings.context_length - 1
            message = f"has {num_prompt} tokens, the context allows at most {limit}"
            raise InvalidRequest("prompt", message, reason=Reason.PROMPT_TOO_LONG)
        if not self.fits(num_prompt + max(1, max_tokens)):
            limit = self.max_sequence_tokens
            if num_prompt >= limit:
                message = f"has {num_prompt} tokens, the KV pages hold at most {limit - 1}"
                raise InvalidRequest("prompt", message, reason=Reason.PROMPT_TOO_LONG)
            limit -= num_prompt
            raise InvalidRequest("stopping.max_tokens", f"is {max_tokens}, the KV pages leave room for {limit}")

    def add(self, sequence: Sequence) -> None:
        """Takes a waiting sequence, new or from another worker. InvalidRequest if it could never be served."""
        assert sequence.state is SequenceState.WAITING, sequence
        self.check_fits(sequence.request)
        self._roster.add(sequence)
        self._turns.note(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """Forgets a sequence, if it is not over. Its pages come free now, or when its step in flight ends."""
        if sequence.is_over:
            return
        self._roster.remove(sequence)
        sequence.cancel()
        if not sequence.in_flight:
            self._roster.release(sequence)

    def schedule(self) -> Step | None:
        """The next step. None: no lane is free, or nothing can be done until a step ends or a request comes."""
        if len(self._in_flight) >= self.settings.num_lanes:
            return None
        return self._begin(self._turns.next_chunks(self._in_flight))

    def _begin(self, chunks: list[Chunk]) -> Step | None:
        if not chunks:
            return None
        step = Step(tuple(chunks))
        self._in_flight[step] = None
        return step

    def complete(self, step: Step, token_ids: Listed[int], faulty: Container[int] = ()) -> list[Drawn]:
        """Takes in what a step computed: `token_ids` holds one token per chunk that wants one, in their order.

        faulty: places of chunks that came out as nothing that can be used: their sequences wait to be recomputed, and
        no page that they filled becomes known.
        Returns what each sequence got, in the order of the chunks. A step from before `drain_all` is ignored.
        """
        if not self._take_back(step):
            return []
        assert len(token_ids) == sum(chunk.wants_token for chunk in step.chunks), "tokens and chunks differ"
        tokens = iter(token_ids)
        results: list[Drawn] = []
        is_alone = len(step.chunks) == 1
        for place, chunk in enumerate(step.chunks):
            sequence = chunk.sequence
            token_id = next(tokens) if chunk.wants_token else None
            if place in faulty:
                self._roster.give_back(sequence)
                continue
            sequence.num_computed = chunk.end
            self._roster.publish(chunk)
            if sequence.is_over:
                self._roster.release(sequence)
                continue
            if token_id is not None:
                sequence.append(token_id)
                sequence.num_faults = 0  # it was the worker's: what is the sequence's own comes again at the same token
                if is_alone and sequence.is_suspect:
                    sequence.acquit()
            elif sequence.num_to_compute:
                continue
            reason = self._finish_reason(sequence)
            if reason:
                sequence.finish(reason)
                self._roster.remove(sequence)
                self._roster.release(sequence)
            results.append(Drawn(sequence, token_id, reason))
        return results

    def fail(self, step: Step) -> bool:
        """Takes back a step that was lost: nothing it computed is trusted, its sequences wait to be recomputed.

        The worker must be done with the step: its pages go to others, and a late write would spoil them. Pages
        published by earlier steps stay known. A step from before `drain_all` is ignored: its sequences may be
        another worker's by now. Returns whether it was not.
        """
        if not self._take_back(step):
            return False
        for chunk in step.chunks:
            self._roster.give_back(chunk.sequence)
        return True

    def give_up(self, most: int, may_leave: Callable[[Sequence], bool]) -> list[Sequence]:
        """Takes out up to `most` sequences that are in no step and may leave, oldest first and ready for another
        worker. What this one has computed of them is forgotten."""
        return self._roster.give_up(most, may_leave)

    def is_in_flight(self, step: Step) -> bool:
        """Whether the step is still waited for: not since `drain_all`."""
        return step in self._in_flight

    def drain_all(self) -> list[Sequence]:
        """Gives up every sequence, oldest first and ready for another worker: this one is lost or starts anew.

        Steps in flight and all pages are forgotten.
        """
        for step in list(self._in_flight):
            self._take_back(step)
            for chunk in step.chunks:
                chunk.sequence.drop_pages()
        return self._roster.give_up_all()

    def check(self) -> None:
        """Asserts what must always hold of steps, sequences and pages."""
        flying = [chunk.sequence for step in self._in_flight for chunk in step.chunks]
        self._roster.check(flying)
        assert len(set(flying)) == len(flying), "a sequence is in two steps"
        assert len(self._in_flight) <= self.settings.num_lanes, "more steps than lanes"

    def _finish_reason(self, sequence: Sequence) -> FinishReason | None:
        """Why the sequence ends with its last token; None if it goes on."""
        reason = sequence.end_reason
        is_full = sequence.num_tokens >= self.settings.context_length
        return FinishReason.LENGTH if reason is None and is_full else reason

    def _take_back(self, step: Step) -> bool:
        """Ends a step's flight. False if it is none of ours."""
        if step not in self._in_flight:
            return False
        del self._in_flight[step]
        for chunk in step.chunks:
            chunk.sequence.in_flight = False
        return True
