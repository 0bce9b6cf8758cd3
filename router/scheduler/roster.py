"""Who waits and who runs on one attention worker, and which pages each of them holds.

                        +-------extend: a page more--------+
                        |                                  v
    ---add---> waiting ---admit, with all its pages---> running ---remove, release---> gone
                  ^                                        |
                  +----requeue, without any: preempted-----+
                         or what was computed is lost

A sequence gets pages for all its tokens at admission, so only a decode can find no page; then the youngest sequence
gives up its pages and is recomputed later. Who goes next is decided in router/scheduler/filling.py.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection

from router.pages import ROOT, PageLedger, extend_page_hashes
from router.scheduler.promises import Promises
from router.scheduler.queue import SequenceQueue
from router.sequence import Sequence, SequenceState
from router.step import Chunk, SchedulerSettings

ADMISSION_LOOKAHEAD = 16
"""Waiting sequences looked at for one that need not wait for another's prefix."""


class Roster:
    """Nobody else changes these sequences or their ledger.

    is_short: whether the last sequence that was to be admitted found no pages.
    Counters: see Scheduler.
    """

    def __init__(self, settings: SchedulerSettings, ledger: PageLedger) -> None:
        self.ledger = ledger
        self.waiting = SequenceQueue()
        self.running = SequenceQueue()
        self.is_short = False
        self.num_preemptions = 0
        self.prefix_queries_tokens = 0
        self.prefix_hits_tokens = 0
        self._settings = settings
        self._promises = Promises()

    def add(self, sequence: Sequence) -> None:
        """Takes a waiting sequence."""
        self.waiting.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, waiting or running. It keeps its pages until `release`."""
        (self.waiting if sequence.state is SequenceState.WAITING else self.running).remove(sequence)

    def release(self, sequence: Sequence) -> None:
        """Takes a sequence's pages."""
        self._promises.withdraw(sequence)
        self.ledger.release(sequence.drop_pages())

    def requeue(self, sequence: Sequence) -> None:
        """Takes a running sequence's pages; it waits for recomputation, ahead of all that arrived later."""
        self.running.remove(sequence)
        self.release(sequence)
        sequence.requeue()
        self.waiting.add(sequence)

    def give_back(self, sequence: Sequence) -> None:
        """Of a step that is not used: its pages are, or it waits to be recomputed."""
        if sequence.is_over:
            self.release(sequence)
        else:
            self.requeue(sequence)

    def give_up(self, most: int, may_leave: Callable[[Sequence], bool]) -> list[Sequence]:
        """Takes out up to `most` sequences that are in no step and may leave; see Scheduler."""
        leaving = [each for each in self.running if not each.in_flight and may_leave(each)][:most]
        for sequence in leaving:
            self.requeue(sequence)
        leaving += [each for each in self.waiting if each not in leaving and may_leave(each)][: most - len(leaving)]
        for sequence in leaving:
            self.waiting.remove(sequence)
        return _for_another_worker(leaving)

    def give_up_all(self) -> list[Sequence]:
        """Takes out all, oldest first, and forgets every page. Nothing is in flight any more."""
        self._promises.clear()
        for sequence in list(self.running):
            sequence.drop_pages()
            self.running.remove(sequence)
            sequence.requeue()
            self.waiting.add(sequence)
        drained = list(self.waiting)
        self.waiting.clear()
        self.ledger.reset()
        return _for_another_worker(drained)

    def extend(self, sequence: Sequence) -> bool:
        """Sees to it that a decode has a page for its position, if need be at the cost of younger sequences.

        False: it has to sit out, since all younger ones are in flight or it is itself the youngest. It keeps its
        pages: an older one takes them if it must.
        """
        if len(sequence.page_ids) == self.ledger.pages_for(sequence.num_tokens):
            return True
        while (page_ids := self.ledger.allocate(1)) is None:
            youngest = next(other for other in reversed(self.running) if not other.in_flight)
            if youngest is sequence:
                return False
            youngest.num_preemptions += 1
            self.num_preemptions += 1
            self.requeue(youngest)
        sequence.page_ids += tuple(page_ids)
        return True

    def admit_next(self, is_suspect: bool | None) -> Sequence | None:
        """Admits the oldest waiting sequence if there is room. Nobody overtakes it if there is none.

        is_suspect: only of these; None: there are no suspects.
        """
        if len(self.running) >= self._settings.max_running:
            return None
        waiting = (each for each in self.waiting if is_suspect in (None, each.is_suspect))
        for sequence in itertools.islice(waiting, ADMISSION_LOOKAHEAD):
            shared = self._match_prefix(sequence)
            # Who waits for pages that are being computed now gets them for nothing, a step or two later.
            if not self._is_promised(sequence, len(shared)):
                self.is_short = not self._admit(sequence, shared)
                return None if self.is_short else sequence
        return None

    def publish(self, chunk: Chunk) -> None:
        """Makes the pages known that this chunk filled."""
        sequence, page_size = chunk.sequence, self.ledger.page_size
        num_full = chunk.end // page_size
        extend_page_hashes(sequence.page_hashes, sequence.all_ids, page_size, num_full, _root_of(sequence))
        for index in range(chunk.start // page_size, num_full):
            self.ledger.publish(sequence.page_ids[index], sequence.page_hashes[index])
            self._promises.keep(sequence.page_hashes[index])

    def check(self, flying: Collection[Sequence]) -> None:
        """Asserts what must always hold: a page has as many references as sequences that list it, and so on.

        flying: the sequences in a step.
        """
        self.ledger.check()
        holders = {*self.running, *flying}
        listed = Counter(page_id for sequence in holders for page_id in sequence.page_ids)
        for page_id in range(self.ledger.num_pages):
            assert self.ledger.num_references(page_id) == listed[page_id], f"page {page_id}: {listed[page_id]} listed"
        assert len(self.running) <= self._settings.max_running, "too many running"
        for sequence in holders:
            assert sequence.in_flight == (sequence in flying), sequence
            assert sequence.num_computed < sequence.num_tokens, sequence
            num_pages = self.ledger.pages_for(sequence.num_tokens)
            assert num_pages - 1 <= len(sequence.page_ids) <= num_pages, sequence
        for sequence in self.running:
            assert sequence.state is SequenceState.RUNNING, sequence
        self._promises.check(holders)
        for sequence in self.waiting:
            assert sequence.state is SequenceState.WAITING, sequence
            assert not any((sequence.page_ids, sequence.num_computed, sequence.in_flight)), sequence

    def _match_prefix(self, sequence: Sequence) -> list[int]:
        """Pages that hold the sequence's beginning already."""
        if sequence.computes_all:
            return []
        # One token at least is left to compute: its logits give the next.
        page_size = self.ledger.page_size
        num_full = (sequence.num_tokens - 1) // page_size
        extend_page_hashes(sequence.page_hashes, sequence.all_ids, page_size, num_full, _root_of(sequence))
        return self.ledger.match(sequence.page_hashes[:num_full])

    def _is_promised(self, sequence: Sequence, index: int) -> bool:
        """Whether a running sequence is about to compute the `index`-th page of this one."""
        num_full = (sequence.num_tokens - 1) // self.ledger.page_size
        return not sequence.computes_all and index < num_full and sequence.page_hashes[index] in self._promises

    def _admit(self, sequence: Sequence, shared: list[int]) -> bool:
        """Gives pages to a waiting sequence, the first of them shared. False: there are not enough."""
        ledger = self.ledger
        num_new = ledger.pages_for(sequence.num_tokens) - len(shared)
        reserve = math.ceil(self._settings.admission_watermark * ledger.num_pages) if self.running else 0
        if ledger.num_available_beside(shared) < num_new + reserve:
            return False
        ledger.acquire(shared)
        new = ledger.allocate(num_new)
        assert new is not None
        self.waiting.remove(sequence)
        self.running.add(sequence)
        sequence.admit((*shared, *new), len(shared) * ledger.page_size)
        num_full = sequence.num_tokens // ledger.page_size
        extend_page_hashes(sequence.page_hashes, sequence.all_ids, ledger.page_size, num_full, _root_of(sequence))
        self._promises.make(sequence, sequence.page_hashes[len(shared) : num_full])
        if sequence.num_admissions == 1 and not sequence.computes_all:
            self.prefix_queries_tokens += sequence.num_tokens
            self.prefix_hits_tokens += sequence.num_cached_tokens
        return True


def _root_of(sequence: Sequence) -> bytes:
    """What its pages' hashes begin with: rows in place of ids are shared with those who have the same rows only."""
    embeds = sequence.request.embeds
    return ROOT if embeds is None else embeds.digest


def _for_another_worker(sequences: list[Sequence]) -> list[Sequence]:
    for sequence in sequences:
        sequence.page_hashes.clear()  # another worker's pages may have another size
    return sequences
