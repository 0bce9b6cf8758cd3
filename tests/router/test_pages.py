"""The page ledger: examples first, then a state machine that tries everything in any order."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from router.pages import PageLedger, extend_page_hashes

PAGE_SIZE = 4


def hashes_of(token_ids: list[int]) -> list[bytes]:
    hashes: list[bytes] = []
    extend_page_hashes(hashes, token_ids, PAGE_SIZE, len(token_ids) // PAGE_SIZE)
    return hashes


def allocate(ledger: PageLedger, num_pages: int) -> list[int]:
    page_ids = ledger.allocate(num_pages)
    assert page_ids is not None
    return page_ids


def publish(ledger: PageLedger, token_ids: list[int]) -> list[int]:
    """Allocates and publishes the full pages of a text, as a sequence does that computed it."""
    hashes = hashes_of(token_ids)
    page_ids = allocate(ledger, len(hashes))
    for page_id, page_hash in zip(page_ids, hashes, strict=True):
        ledger.publish(page_id, page_hash)
    return page_ids


def states(ledger: PageLedger) -> tuple[int, int, int]:
    ledger.check()
    return ledger.num_free, ledger.num_cached, ledger.num_used


class TestHashes:
    def test_a_hash_names_the_whole_prefix(self) -> None:
        one = hashes_of([1, 2, 3, 4, 9, 9, 9, 9])
        other = hashes_of([5, 6, 7, 8, 9, 9, 9, 9])
        assert one[1] != other[1], "equal tokens after different prefixes are different pages"
        assert hashes_of([1, 2, 3, 4, 0, 0])[0] == one[0]

    def test_the_chain_grows_without_rehashing(self) -> None:
        hashes = hashes_of([1, 2, 3, 4])
        first = hashes[0]
        extend_page_hashes(hashes, [1, 2, 3, 4, 5, 6, 7, 8], PAGE_SIZE, 2)
        assert hashes == hashes_of([1, 2, 3, 4, 5, 6, 7, 8])
        assert hashes[0] is first

    def test_token_boundaries_count(self) -> None:
        assert hashes_of([1, 0, 0, 0]) != hashes_of([0, 1, 0, 0])

    def test_a_partial_page_has_none(self) -> None:
        with pytest.raises(AssertionError, match="full pages"):
            extend_page_hashes([], [1, 2, 3], PAGE_SIZE, 1)


class TestLedger:
    def test_allocation_is_all_or_nothing(self) -> None:
        ledger = PageLedger(4, PAGE_SIZE)
        assert ledger.allocate(5) is None
        assert states(ledger) == (4, 0, 0)
        assert sorted(allocate(ledger, 4)) == [0, 1, 2, 3]
        assert ledger.allocate(1) is None
        assert ledger.allocate(0) == []

    def test_private_pages_come_free(self) -> None:
        ledger = PageLedger(4, PAGE_SIZE)
        ledger.release(allocate(ledger, 3))
        assert states(ledger) == (4, 0, 0)

    def test_a_published_page_is_kept_and_found(self) -> None:
        ledger = PageLedger(4, PAGE_SIZE)
        page_ids = publish(ledger, [1, 2, 3, 4, 5, 6, 7, 8])
        ledger.release(page_ids)
        assert states(ledger) == (2, 2, 0)
        assert ledger.match(hashes_of([1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 9])) == page_ids
        assert ledger.match(hashes_of([1, 2, 3, 4, 0, 0, 0, 0])) == page_ids[:1]
        assert ledger.match(hashes_of([0, 2, 3, 4])) == []

    def test_sharing_counts_references(self) -> None:
        ledger = PageLedger(4, PAGE_SIZE)
        page_ids = publish(ledger, [1, 2, 3, 4])
        ledger.acquire(page_ids)
        assert ledger.num_references(page_ids[0]) == 2
        ledger.release(page_ids)
        assert states(ledger) == (3, 0, 1)
        ledger.release(page_ids)
        assert states(ledger) == (3, 1, 0)

    def test_acquiring_cached_pages_leaves_less_to_allocate(self) -> None:
        ledger = PageLedger(4, PAGE_SIZE)
        cached = publish(ledger, [1, 2, 3, 4])
        ledger.release(cached)
        used = publish(ledger, [5, 6, 7, 8])
        assert ledger.num_available == 3
        assert ledger.num_available_beside(cached) == 2
        assert ledger.num_available_beside(used) == 3

    def test_free_pages_go_before_cached_ones(self) -> None:
        ledger = PageLedger(3, PAGE_SIZE)
        ledger.release(publish(ledger, [1, 2, 3, 4]))
        allocate(ledger, 2)
        assert states(ledger) == (0, 1, 2)

    def test_the_least_recently_used_is_evicted(self) -> None:
        ledger = PageLedger(2, PAGE_SIZE)
        first, second = publish(ledger, [1, 1, 1, 1]), publish(ledger, [2, 2, 2, 2])
        ledger.release(first)
        ledger.release(second)
        ledger.acquire(first)
        ledger.release(first)
        assert allocate(ledger, 1) == second
        assert ledger.match(hashes_of([2, 2, 2, 2])) == []
        assert ledger.match(hashes_of([1, 1, 1, 1])) == first

    def test_a_prefix_is_evicted_from_its_end(self) -> None:
        ledger = PageLedger(3, PAGE_SIZE)
        text = [1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]
        page_ids = publish(ledger, text)
        ledger.release(page_ids)
        assert allocate(ledger, 1) == page_ids[2:]
        assert ledger.match(hashes_of(text)) == page_ids[:2]

    def test_the_same_prefix_computed_twice_is_known_once(self) -> None:
        ledger = PageLedger(4, PAGE_SIZE)
        first, second = publish(ledger, [1, 2, 3, 4]), publish(ledger, [1, 2, 3, 4])
        assert ledger.match(hashes_of([1, 2, 3, 4])) == first
        ledger.release(second)
        assert states(ledger) == (3, 0, 1), "the second copy is of no use to anyone"

    def test_a_new_incarnation_knows_nothing(self) -> None:
        ledger = PageLedger(4, PAGE_SIZE)
        publish(ledger, [1, 2, 3, 4])
        ledger.reset()
        assert states(ledger) == (4, 0, 0)
        assert ledger.match(hashes_of([1, 2, 3, 4])) == []

    def test_what_only_a_bug_does_is_caught(self) -> None:
        ledger = PageLedger(4, PAGE_SIZE)
        page_ids = allocate(ledger, 1)
        with pytest.raises(AssertionError, match="not shared"):
            ledger.acquire(page_ids)
        ledger.release(page_ids)
        with pytest.raises(AssertionError, match="nobody's"):
            ledger.release(page_ids)
        with pytest.raises(AssertionError, match="nobody's"):
            ledger.publish(page_ids[0], hashes_of([1, 2, 3, 4])[0])


TEXTS = st.lists(st.integers(0, 1), min_size=1, max_size=5 * PAGE_SIZE)
"""Two tokens only, so that prefixes meet."""


class LedgerMachine(RuleBasedStateMachine):
    """Sequences come with a text, share what is known, publish what they filled, and go.

    The model is the content of every page: what `match` returns must hold just the prefix asked for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ledger = PageLedger(8, PAGE_SIZE)
        self.content: dict[int, tuple[int, ...]] = {}  # page -> the whole prefix up to its end
        self.holders: list[tuple[list[int], list[int]]] = []  # (text, pages)

    @rule(text=TEXTS)
    def come(self, text: list[int]) -> None:
        shared = self.ledger.match(hashes_of(text))
        for index, page_id in enumerate(shared):
            assert self.content[page_id] == tuple(text[: (index + 1) * PAGE_SIZE])
        num_new = self.ledger.pages_for(len(text)) - len(shared)
        fits = num_new <= self.ledger.num_available_beside(shared)
        self.ledger.acquire(shared)
        new = self.ledger.allocate(num_new)
        assert (new is not None) == fits
        if new is None:
            self.ledger.release(shared)
            return
        assert not {page_id for _, pages in self.holders for page_id in pages} & set(new)
        page_ids = shared + new
        for index in range(len(shared), len(text) // PAGE_SIZE):
            self.content[page_ids[index]] = tuple(text[: (index + 1) * PAGE_SIZE])
            self.ledger.publish(page_ids[index], hashes_of(text)[index])
        self.holders.append((text, page_ids))

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def go(self, data: st.DataObject) -> None:
        _, page_ids = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        self.ledger.release(page_ids)

    @precondition(lambda self: len(self.holders) > 2)
    @rule()
    def worker_restarts(self) -> None:
        self.ledger.reset()
        self.holders.clear()
        self.content.clear()

    @invariant()
    def adds_up(self) -> None:
        self.ledger.check()
        listed = Counter(page_id for _, page_ids in self.holders for page_id in page_ids)
        assert [self.ledger.num_references(page_id) for page_id in range(8)] == [listed[i] for i in range(8)]

    def teardown(self) -> None:
        for _, page_ids in self.holders:
            self.ledger.release(page_ids)
        self.ledger.check()
        assert self.ledger.num_used == 0


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
