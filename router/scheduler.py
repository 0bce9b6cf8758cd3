"""Who computes what next on one attention worker: continuous batching, chunked prefill, preemption, prefix reuse.

The engine's loop per lane is three statements: `step = scheduler.schedule()`, run it, and
`scheduler.complete(step, tokens)` or `scheduler.fail(step)`. Each lane has one step in flight; any may end first.

A step is filled in this order, within its budget of tokens: decodes, then prefills begun earlier, then admissions;
within each the oldest first. A sequence gets pages for all its tokens at admission, so only a decode can find no
page; then the youngest sequence gives up its pages and is recomputed later. Nothing here waits or sends.

A sequence that has lost its worker several times may be what kills workers. It is computed in steps of its own, with
nothing else in flight, in turn with the steps of all others, until it has drawn a token: if it is the one, nobody else
is counted among its victims again.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Container
from collections.abc import Sequence as Listed

from grokmoe.errors import InvalidRequest, Reason
from router.pages import PageLedger, extend_page_hashes
from router.sequence import FinishReason, Request, Sequence, SequenceQueue, SequenceState
from router.step import Chunk, Drawn, SchedulerSettings, Step

ADMISSION_LOOKAHEAD = 16
"""Waiting sequences looked at for one that need not wait for another's prefix."""


class Scheduler:
    """Decides for one attention worker: nobody else changes its sequences or its ledger.

    Counters, for metrics; recomputations do not count as queries or hits:
        num_preemptions: sequences preempted for want of pages.
        prefix_queries_tokens: tokens looked up in the prefix cache.
        prefix_hits_tokens: of those, tokens found.
    """

    def __init__(self, settings: SchedulerSettings, ledger: PageLedger) -> None:
        self.settings = settings
        self.ledger = ledger
        self._waiting = SequenceQueue()
        self._running = SequenceQueue()
        self._in_flight: dict[Step, None] = {}
        self._promised: dict[bytes, Sequence] = {}  # hash of a page under way -> who computes it
        self.is_short = False
        """Whether the last sequence that was to be admitted found no pages."""
        self._has_suspects = False
        self._was_alone = False  # the last step was a suspect's: the next one is for the others
        self._is_suspect_short = False  # a suspect waits for pages
        self.num_preemptions = 0
        self.prefix_queries_tokens = 0
        self.prefix_hits_tokens = 0

    @property
    def num_waiting(self) -> int:
        """Sequences without pages."""
        return len(self._waiting)

    @property
    def num_waiting_tokens(self) -> int:
        """Tokens of those."""
        return sum(sequence.num_tokens for sequence in self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences with pages, cancelled ones not counted."""
        return len(self._running)

    @property
    def num_in_flight(self) -> int:
        """Steps given out and not back yet."""
        return len(self._in_flight)

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
        self._waiting.add(sequence)
        self._has_suspects |= sequence.is_suspect

    def cancel(self, sequence: Sequence) -> None:
        """Forgets a sequence, if it is not over. Its pages come free now, or when its step in flight ends."""
        if sequence.is_over:
            return
        (self._waiting if sequence.state is SequenceState.WAITING else self._running).remove(sequence)
        sequence.cancel()
        if not sequence.in_flight:
            self._release(sequence)

    def schedule(self) -> Step | None:
        """The next step. None: no lane is free, or nothing can be done until a step ends or a request comes."""
        if len(self._in_flight) >= self.settings.num_lanes or any(map(_is_alone, self._in_flight)):
            return None
        if self._has_suspects:
            self._has_suspects = any(each.is_suspect for each in itertools.chain(self._running, self._waiting))
        if not self._has_suspects:
            return self._begin(self._fill(None))
        if self._was_alone and (chunks := self._fill_beside_suspects()):
            self._was_alone = False
            return self._begin(chunks)
        if self._in_flight:  # a suspect's turn comes when nobody else can be hurt
            return None
        chunks = self._fill_alone()
        self._was_alone = bool(chunks)
        return self._begin(chunks or self._fill_beside_suspects())

    def _begin(self, chunks: list[Chunk]) -> Step | None:
        if not chunks:
            return None
        step = Step(tuple(chunks))
        self._in_flight[step] = None
        return step

    def _fill(self, is_suspect: bool | None, admits: bool = True) -> list[Chunk]:
        """Chunks of a step. is_suspect: of which sequences; None: there are no suspects."""
        budget = self.settings.max_step_tokens
        ready = [each for each in self._running if not each.in_flight and is_suspect in (None, each.is_suspect)]
        decodes = [sequence for sequence in ready if sequence.num_to_compute == 1]
        prefills = [sequence for sequence in ready if sequence.num_to_compute > 1]
        num_preemptions = self.num_preemptions
        chunks: list[Chunk] = []
        for sequence in decodes[: min(budget, self._lane_share(len(decodes)))]:
            if sequence.state is SequenceState.RUNNING and self._extend(sequence):
                chunks.append(self._chunk(sequence, 1))
        budget -= len(chunks)
        for sequence in prefills:
            if budget and sequence.state is SequenceState.RUNNING:
                chunks.append(self._chunk(sequence, budget))
                budget -= len(chunks[-1].token_ids)
        # Who was just preempted must not come back in the same step to take the pages it gave up.
        while (
            admits and budget and self.num_preemptions == num_preemptions and (admitted := self._admit_next(is_suspect))
        ):
            chunks.append(self._chunk(admitted, budget))
            budget -= len(chunks[-1].token_ids)
        return chunks

    def _fill_beside_suspects(self) -> list[Chunk]:
        """Chunks of those that nobody suspects. Nobody is admitted while a suspect that is older waits for pages: it
        would wait for ever."""
        is_passed = self._is_suspect_short and self._waiting.oldest.is_suspect
        return self._fill(False, admits=not is_passed)

    def _fill_alone(self) -> list[Chunk]:
        """A chunk of the oldest suspect that can be computed now; empty: none can."""
        num_preemptions = self.num_preemptions
        self._is_suspect_short = False
        for sequence in [each for each in self._running if each.is_suspect]:
            is_running = sequence.state is SequenceState.RUNNING  # unless an older one has just taken its pages
            if is_running and (sequence.num_to_compute > 1 or self._extend(sequence)):
                return [self._chunk(sequence, self.settings.max_step_tokens)]
        if self.num_preemptions == num_preemptions and (admitted := self._admit_next(True)):
            return [self._chunk(admitted, self.settings.max_step_tokens)]
        self._is_suspect_short = bool(self._waiting)
        return []

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
                self._give_back(sequence)
                continue
            sequence.num_computed = chunk.end
            self._publish(chunk)
            if sequence.is_over:
                self._release(sequence)
                continue
            if token_id is not None:
                sequence.append(token_id)
                if is_alone and sequence.is_suspect:
                    sequence.acquit()
            elif sequence.num_to_compute:
                continue
            reason = self._finish_reason(sequence)
            if reason:
                sequence.finish(reason)
                self._running.remove(sequence)
                self._release(sequence)
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
            self._give_back(chunk.sequence)
        return True

    def give_up(self, most: int, may_leave: Callable[[Sequence], bool]) -> list[Sequence]:
        """Takes out up to `most` sequences that are in no step and may leave, oldest first and ready for another
        worker. What this one has computed of them is forgotten."""
        leaving = [each for each in self._running if not each.in_flight and may_leave(each)][:most]
        for sequence in leaving:
            self._requeue(sequence)
        leaving += [each for each in self._waiting if each not in leaving and may_leave(each)][: most - len(leaving)]
        for sequence in leaving:
            self._waiting.remove(sequence)
            sequence.page_hashes.clear()  # another worker's pages may have another size
        return leaving

    def is_in_flight(self, step: Step) -> bool:
        """Whether the step is still waited for: not since `drain_all`."""
        return step in self._in_flight

    def drain_all(self) -> list[Sequence]:
        """Gives up every sequence, oldest first and ready for another worker: this one is lost or starts anew.

        Steps in flight and all pages are forgotten.
        """
        self._promised.clear()
        for step in list(self._in_flight):
            self._take_back(step)
            for chunk in step.chunks:
                chunk.sequence.drop_pages()
        for sequence in list(self._running):
            sequence.drop_pages()
            self._running.remove(sequence)
            sequence.requeue()
            self._waiting.add(sequence)
        drained = list(self._waiting)
        for sequence in drained:
            sequence.page_hashes.clear()  # another worker's pages may have another size
        self._waiting.clear()
        self.ledger.reset()
        return drained

    def check(self) -> None:
        """Asserts what must always hold: a page has as many references as sequences that list it, and so on."""
        self.ledger.check()
        flying = [chunk.sequence for step in self._in_flight for chunk in step.chunks]
        holders = {*self._running, *flying}
        listed = Counter(page_id for sequence in holders for page_id in sequence.page_ids)
        for page_id in range(self.ledger.num_pages):
            assert self.ledger.num_references(page_id) == listed[page_id], f"page {page_id}: {listed[page_id]} listed"
        assert len(set(flying)) == len(flying), "a sequence is in two steps"
        assert len(self._in_flight) <= self.settings.num_lanes, "more steps than lanes"
        assert len(self._running) <= self.settings.max_running, "too many running"
        for sequence in holders:
            assert sequence.in_flight == (sequence in flying), sequence
            assert sequence.num_computed < sequence.num_tokens, sequence
            num_pages = self.ledger.pages_for(sequence.num_tokens)
            assert num_pages - 1 <= len(sequence.page_ids) <= num_pages, sequence
        for sequence in self._running:
            assert sequence.state is SequenceState.RUNNING, sequence
        for sequence in self._promised.values():
            assert sequence in holders, f"a page is promised by who will not compute it: {sequence}"
        for sequence in self._waiting:
            assert sequence.state is SequenceState.WAITING, sequence
            assert not any((sequence.page_ids, sequence.num_computed, sequence.in_flight)), sequence

    def _lane_share(self, num_ready: int) -> int:
        """How many of the decodes that are ready the next step takes.

        With all decodes, ready or in flight, enough for n lanes, n steps share them. When n steps with decodes are
        in flight already, the others wait to join one of them: else a few decodes that once came out of step would
        read all weights for themselves for the rest of their lives.
        """
        in_flight = [step.num_decodes for step in self._in_flight if step.num_decodes]
        num_decodes = num_ready + sum(in_flight)
        num_shares = max(1, min(self.settings.num_lanes, num_decodes // self.settings.min_lane_rows))
        return 0 if len(in_flight) >= num_shares else math.ceil(num_decodes / num_shares)

    def _chunk(self, sequence: Sequence, budget: int) -> Chunk:
        """The next tokens of a sequence that holds the pages for them; marks it as in flight."""
        limit = self.settings.max_chunk_tokens or self.settings.max_step_tokens
        start = sequence.num_computed
        end = start + min(sequence.num_to_compute, budget, limit)
        sequence.in_flight = True
        return Chunk(
            sequence,
            start,
            token_ids=tuple(sequence.all_ids[start:end]),
            page_ids=sequence.page_ids[: self.ledger.pages_for(end)],
            wants_token=end == sequence.num_tokens and sequence.request.max_tokens > 0,
        )

    def _extend(self, sequence: Sequence) -> bool:
        """Sees to it that a decode has a page for its position, if need be at the cost of younger sequences.

        False: it has to sit out, since all younger ones are in flight or it is itself the youngest. It keeps its
        pages: an older one takes them if it must.
        """
        if len(sequence.page_ids) == self.ledger.pages_for(sequence.num_tokens):
            return True
        while (page_ids := self.ledger.allocate(1)) is None:
            youngest = next(other for other in reversed(self._running) if not other.in_flight)
            if youngest is sequence:
                return False
            youngest.num_preemptions += 1
            self.num_preemptions += 1
            self._requeue(youngest)
        sequence.page_ids += tuple(page_ids)
        return True

    def _admit_next(self, is_suspect: bool | None) -> Sequence | None:
        """Admits the oldest waiting sequence if there is room. Nobody overtakes it if there is none.

        is_suspect: only of these; None: there are no suspects.
        """
        if len(self._running) >= self.settings.max_running:
            return None
        waiting = (each for each in self._waiting if is_suspect in (None, each.is_suspect))
        for sequence in itertools.islice(waiting, ADMISSION_LOOKAHEAD):
            shared = self._match_prefix(sequence)
            # Who waits for pages that are being computed now gets them for nothing, a step or two later.
            if not self._is_promised(sequence, len(shared)):
                self.is_short = not self._admit(sequence, shared)
                return None if self.is_short else sequence
        return None

    def _match_prefix(self, sequence: Sequence) -> list[int]:
        """Pages that hold the sequence's beginning already."""
        if sequence.computes_all:
            return []
        # One token at least is left to compute: its logits give the next.
        num_full = (sequence.num_tokens - 1) // self.ledger.page_size
        extend_page_hashes(sequence.page_hashes, sequence.all_ids, self.ledger.page_size, num_full)
        return self.ledger.match(sequence.page_hashes[:num_full])

    def _is_promised(self, sequence: Sequence, index: int) -> bool:
        """Whether a running sequence is about to compute the `index`-th page of this one."""
        num_full = (sequence.num_tokens - 1) // self.ledger.page_size
        return not sequence.computes_all and index < num_full and sequence.page_hashes[index] in self._promised

    def _admit(self, sequence: Sequence, shared: list[int]) -> bool:
        """Gives pages to a waiting sequence, the first of them shared. False: there are not enough."""
        ledger = self.ledger
        num_new = ledger.pages_for(sequence.num_tokens) - len(shared)
        reserve = math.ceil(self.settings.admission_watermark * ledger.num_pages) if self._running else 0
        if ledger.num_available_beside(shared) < num_new + reserve:
            return False
        ledger.acquire(shared)
        new = ledger.allocate(num_new)
        assert new is not None
        self._waiting.remove(sequence)
        self._running.add(sequence)
        sequence.admit((*shared, *new), len(shared) * ledger.page_size)
        num_full = sequence.num_tokens // ledger.page_size
        extend_page_hashes(sequence.page_hashes, sequence.all_ids, ledger.page_size, num_full)
        for page_hash in sequence.page_hashes[len(shared) : num_full]:
            self._promised.setdefault(page_hash, sequence)
        if sequence.num_admissions == 1 and not sequence.computes_all:
            self.prefix_queries_tokens += sequence.num_tokens
            self.prefix_hits_tokens += sequence.num_cached_tokens
        return True

    def _publish(self, chunk: Chunk) -> None:
        """Makes the pages known that this chunk filled."""
        sequence, page_size = chunk.sequence, self.ledger.page_size
        num_full = chunk.end // page_size
        extend_page_hashes(sequence.page_hashes, sequence.all_ids, page_size, num_full)
        for index in range(chunk.start // page_size, num_full):
            self.ledger.publish(sequence.page_ids[index], sequence.page_hashes[index])
            self._promised.pop(sequence.page_hashes[index], None)

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

    def _give_back(self, sequence: Sequence) -> None:
        """Of a step that is not used: its pages are, or it waits to be recomputed."""
        if sequence.is_over:
            self._release(sequence)
        else:
            self._requeue(sequence)

    def _requeue(self, sequence: Sequence) -> None:
        """Takes a running sequence's pages; it waits for recomputation, ahead of all that arrived later."""
        self._running.remove(sequence)
        self._release(sequence)
        sequence.requeue()
        self._waiting.add(sequence)

    def _release(self, sequence: Sequence) -> None:
        for page_hash in sequence.page_hashes:
            if self._promised.get(page_hash) is sequence:
                del self._promised[page_hash]
        self.ledger.release(sequence.drop_pages())


def _is_alone(step: Step) -> bool:
    """Whether nothing else may be in flight beside it."""
    return len(step.chunks) == 1 and step.chunks[0].sequence.is_suspect
