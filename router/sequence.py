"""One candidate's life: what was asked, what was drawn so far, and where its keys and values lie.

    WAITING --admit--> RUNNING --finish--> FINISHED
       ^                  |
       +-----requeue------+        cancel: from WAITING or RUNNING to CANCELLED

A request with `n` candidates has a sequence for each. Knows nothing of other sequences: the scheduler decides, a
sequence keeps its own books. Positions count from 0; "computed" means that a position's keys and values are in the
pages.
"""

from __future__ import annotations

import enum

from grokmoe.errors import GrokmoeError, InternalError, InvalidRequest, Reason
from grokmoe.step_plan import TokenSampling
from router.fair_share import Place
from router.request import Constraint, Request

SUSPECT_AFTER = 2
"""Lost workers after which a sequence may be what kills them: one may be anybody's bad luck. Well below the number of
them that ends a request (EngineSettings.max_migrations), so that nobody innocent comes near it."""


class FinishReason(enum.StrEnum):
    """Why generation ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORTED = "aborted"
    ERROR = "error"
    """Its structured output cannot go on; `Sequence.error` says why."""


class SequenceState(enum.StrEnum):
    """Where a sequence is in its life."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    CANCELLED = "cancelled"


class Sequence:
    """The mutable state of one candidate of a request, the `index`-th.

    `arrival` is its place in the queue, unique in the service: the lower, the sooner; "older" below means this. It is
    kept for life, also when the sequence moves to another worker, and decides who goes first and who is preempted.

    Attributes:
        all_ids: prompt and output, growing in place; read it, never change it.
        constraint: what the structured output allows next; None: anything. Its mask is made when a token is taken, so
            that it cannot fail later, in the middle of a step's plan.
        fixed_sampling: how every further token is drawn, once that is certain (router/plan_writer.py).
        error: why the structured output cannot go on.
        page_ids: pages of positions 0, 1, ..., `page_size` positions each. A tuple, so that a plan can hold it
            without a copy; it is replaced when a page is added.
        page_hashes: chained hashes of the first full pages, as far as anyone needed them. Tokens never change, so
            they outlive the pages: every page is hashed once in a lifetime.
        num_computed: positions computed.
        in_flight: part of a step that has not ended. Its pages must not be touched.
        num_cached_tokens: tokens found in the prefix cache at the first admission.
        num_admissions: times admitted; above 1 after preemption or loss.
        num_preemptions: times preempted for want of pages.
        num_migrations: times it was in a step on a worker that was lost.
        num_acquitted: of these, times that it was found not to be what had killed the worker: the worker lived after
            all, or the sequence has since drawn a token in a step of its own.
        num_moves: times it left a worker for being slow.
        num_faults: times in a row that it came out as something that is not finite; faulty_at: at which worker last.
    """

    __slots__ = (
        "_is_complete",
        "all_ids",
        "arrival",
        "constraint",
        "error",
        "faulty_at",
        "finish_reason",
        "fixed_sampling",
        "in_flight",
        "index",
        "num_acquitted",
        "num_admissions",
        "num_cached_tokens",
        "num_computed",
        "num_faults",
        "num_migrations",
        "num_moves",
        "num_preemptions",
        "page_hashes",
        "page_ids",
        "request",
        "state",
    )

    def __init__(self, request: Request, arrival: Place, index: int = 0) -> None:
        """Raises InvalidRequest when the structured output cannot even begin, or nothing is left to resume."""
        assert request.prompt_ids, "a prompt has at least one token"
        assert request.max_tokens >= 0, request.max_tokens
        self.request = request
        self.arrival = arrival
        self.index = index
        self.constraint = request.grammar.start() if request.grammar else None
        self.error: GrokmoeError | None = None
        self._is_complete = False
        if self.constraint is not None:
            if self.constraint.is_complete:
                raise InvalidRequest("structured", "allows the empty text only", reason=Reason.INVALID_GRAMMAR)
            self.constraint.allowed()
        self.state = SequenceState.WAITING
        self.finish_reason: FinishReason | None = None
        self.fixed_sampling: TokenSampling | None = None
        self.all_ids: list[int] = list(request.prompt_ids)
        for token_id in request.resumed_ids:
            self._take(token_id)
        if self.error is not None:
            raise InvalidRequest("resumed.ids", self.error.message)
        if request.resumed_ids and self.end_reason:
            raise InvalidRequest("resumed", f"is complete already: {self.end_reason}")
        self.page_ids: tuple[int, ...] = ()
        self.page_hashes: list[bytes] = []
        self.num_computed = 0
        self.in_flight = False
        self.num_cached_tokens = 0
        self.num_admissions = 0
        self.num_preemptions = 0
        self.num_migrations = 0
        self.num_acquitted = 0
        self.num_moves = 0
        self.num_faults, self.faulty_at = 0, ""

    def __repr__(self) -> str:
        return (
            f"Sequence({self.request.request_id!r}[{self.index}], {self.state}, {len(self.request.prompt_ids)}+"
            f"{self.num_outputs} tokens, {self.num_computed} computed, pages {self.page_ids})"
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and output."""
        return len(self.all_ids)

    @property
    def num_outputs(self) -> int:
        """Tokens drawn."""
        return len(self.all_ids) - len(self.request.prompt_ids)

    @property
    def output_ids(self) -> list[int]:
        """The tokens drawn, a stop token included. A copy: per step use `num_outputs` and `all_ids`."""
        return self.all_ids[len(self.request.prompt_ids) :]

    @property
    def num_to_compute(self) -> int:
        """Positions to compute before the next token is drawn: 1 in decode, more in prefill (and recompute)."""
        return len(self.all_ids) - self.num_computed

    @property
    def scores_prompt(self) -> bool:
        """Whether the prompt's log-probabilities are still wanted; one candidate gives them for all."""
        return self.request.prompt_logprobs is not None and self.index == 0 and self.num_outputs == 0

    @property
    def computes_all(self) -> bool:
        """Whether every position has to be computed, so that the prefix cache is of no use."""
        return self.request.logits or self.scores_prompt

    @property
    def end_reason(self) -> FinishReason | None:
        """Why the sequence ends with its last token; None if it goes on. The context's end is not known here."""
        request, num_outputs = self.request, self.num_outputs
        if self.error is not None:
            return FinishReason.ERROR
        if num_outputs and num_outputs >= request.min_tokens and self.all_ids[-1] in request.stop_ids:
            return FinishReason.STOP
        if self._is_complete:
            return FinishReason.STOP
        return FinishReason.LENGTH if num_outputs >= request.max_tokens else None

    def admit(self, page_ids: tuple[int, ...], num_cached_tokens: int) -> None:
        """WAITING -> RUNNING with pages for all tokens so far, the first of them shared and computed already."""
        assert self.state is SequenceState.WAITING, self
        if self.num_admissions == 0:
            self.num_cached_tokens = num_cached_tokens
        self.state = SequenceState.RUNNING
        self.page_ids = page_ids
        self.num_computed = num_cached_tokens
        self.num_admissions += 1

    def append(self, token_id: int) -> None:
        """Takes the token drawn after the last computed position."""
        assert self.state is SequenceState.RUNNING, self
        assert self.num_to_compute == 0, self
        self._take(token_id)

    def _take(self, token_id: int) -> None:
        self.all_ids.append(token_id)
        if self.constraint is not None:
            try:
                self._is_complete = _advance(self.constraint, token_id)
            except GrokmoeError as error:
                self.error = error

    def finish(self, reason: FinishReason) -> None:
        """RUNNING -> FINISHED."""
        assert self.state is SequenceState.RUNNING, self
        self.state = SequenceState.FINISHED
        self.finish_reason = reason

    def cancel(self) -> None:
        """WAITING or RUNNING -> CANCELLED."""
        assert not self.is_over, self
        self.state = SequenceState.CANCELLED

    def requeue(self) -> None:
        """RUNNING -> WAITING, to be recomputed: tokens stay, since clients have seen them. Pages were dropped."""
        assert self.state is SequenceState.RUNNING, self
        assert not self.page_ids, self
        self.state = SequenceState.WAITING

    def drop_pages(self) -> tuple[int, ...]:
        """Forgets the pages and what was computed in them; returns them for the ledger."""
        assert not self.in_flight, self
        page_ids, self.page_ids, self.num_computed = self.page_ids, (), 0
        return page_ids

    @property
    def is_suspect(self) -> bool:
        """Whether it may be what kills workers: it is then computed in steps of its own until it has drawn a token."""
        return self.num_migrations - self.num_acquitted >= SUSPECT_AFTER

    def acquit(self) -> None:
        """It has drawn a token in a step of its own, and the worker lives."""
        self.num_acquitted = self.num_migrations

    @property
    def is_over(self) -> bool:
        """Finished or cancelled."""
        return self.state in (SequenceState.FINISHED, SequenceState.CANCELLED)


def _advance(constraint: Constraint, token_id: int) -> bool:
    """Takes a token and makes the mask of the next. Returns whether nothing can follow."""
    if not constraint.accept(token_id):
        raise InternalError(f"token {token_id} was drawn, which the structured output does not allow")
    is_complete = constraint.is_complete
    if not is_complete:
        constraint.allowed()
    return is_complete
