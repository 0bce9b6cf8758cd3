"""Who holds which KV page of one attention worker, and which pages can be reused for equal prefixes.

A page is in exactly one of three states:

    free    nothing of use in it
    used    listed by at least one sequence; its reference count says by how many
    cached  listed by none, but full, computed and in the prefix index; evicted when free pages run out

Only full, computed pages are ever shared, and nobody writes to a full page: a sequence that goes on writes into a
page of its own. So copy-on-write never arises. The ledger holds numbers only; keys and values are on the worker.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

HASH_BYTES = 16
"""Length of a page hash. At 128 bits equal hashes mean equal tokens: a match is not compared again."""

ROOT = bytes(HASH_BYTES)
"""What the first page's hash begins with where ids and the model alone decide keys and values."""


def extend_page_hashes(
    hashes: list[bytes], token_ids: Sequence[int], page_size: int, num_pages: int, root: bytes = ROOT
) -> None:
    """Extends a chain of page hashes, in place, to cover the first `num_pages` pages of `token_ids`.

    A page's hash covers its own tokens and its parent's hash, so it names the whole prefix up to its end. What the
    chain holds already is not hashed again.
    root: what else decides its keys and values, HASH_BYTES.
    """
    assert num_pages * page_size <= len(token_ids), "only full pages have a hash"
    for index in range(len(hashes), num_pages):
        parent = hashes[index - 1] if index else root
        content = array("I", token_ids[index * page_size : (index + 1) * page_size]).tobytes()
        hashes.append(hashlib.blake2b(parent + content, digest_size=HASH_BYTES).digest())


class PageLedger:
    """Reference counts, free pages and the prefix index of one attention worker's `num_pages` pages."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        assert min(num_pages, page_size) >= 1, (num_pages, page_size)
        self.num_pages = num_pages
        self.page_size = page_size
        self.reset()

    def reset(self) -> None:
        """Forgets everything: the worker has a new incarnation and its pages are empty."""
        self._num_references = [0] * self.num_pages
        self._free = list(range(self.num_pages - 1, -1, -1))
        self._hash_of_page: dict[int, bytes] = {}
        self._page_of_hash: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def num_free(self) -> int:
        """Pages with nothing of use in them."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Pages nobody lists, kept for their prefix."""
        return len(self._cached)

    @property
    def num_used(self) -> int:
        """Pages listed by sequences."""
        return self.num_pages - len(self._free) - len(self._cached)

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can give: free and cached."""
        return len(self._free) + len(self._cached)

    def num_references(self, page_id: int) -> int:
        """How many sequences list the page."""
        return self._num_references[page_id]

    def pages_for(self, num_positions: int) -> int:
        """Pages that this many positions fill or begin."""
        return -(-num_positions // self.page_size)

    def match(self, page_hashes: Iterable[bytes]) -> list[int]:
        """The pages that hold the longest known prefix of a chain of page hashes, in order. Takes no reference."""
        page_ids: list[int] = []
        for page_hash in page_hashes:
            page_id = self._page_of_hash.get(page_hash)
            if page_id is None:
                break
            page_ids.append(page_id)
        return page_ids

    def num_available_beside(self, page_ids: Iterable[int]) -> int:
        """Pages that `allocate` can give once these, found by `match`, are acquired."""
        return self.num_available - sum(page_id in self._cached for page_id in page_ids)

    def acquire(self, page_ids: Iterable[int]) -> None:
        """Takes one more reference to each of these pages, found by `match`."""
        for page_id in page_ids:
            assert page_id in self._hash_of_page, f"page {page_id} is not shared"
            if self._num_references[page_id] == 0:
                del self._cached[page_id]
            self._num_references[page_id] += 1

    def allocate(self, num_pages: int) -> list[int] | None:
        """Gives `num_pages` private pages, or None if there are not as many.

        Takes free pages first, then evicts the cached pages used least recently.
        """
        if num_pages > self.num_available:
            return None
        page_ids: list[int] = []
        for _ in range(num_pages):
            page_id = self._free.pop() if self._free else self._evict()
            self._num_references[page_id] = 1
            page_ids.append(page_id)
        return page_ids

    def publish(self, page_id: int, page_hash: bytes) -> None:
        """Makes a full, computed page known for reuse.

        If another page is known by this hash (two sequences computed the same prefix side by side), that one stays,
        and this page remains private and becomes free when released.
        """
        assert self._num_references[page_id] > 0, f"page {page_id} is nobody's"
        assert page_id not in self._hash_of_page, f"page {page_id} was published before"
        if page_hash not in self._page_of_hash:
            self._page_of_hash[page_hash] = page_id
            self._hash_of_page[page_id] = page_hash

    def release(self, page_ids: Sequence[int]) -> None:
        """Gives back one reference to each page of a sequence, listed in the order of positions.

        The last page is let go first and so evicted first: a prefix whose first page is gone can't be matched.
        """
        for page_id in reversed(page_ids):
            assert self._num_references[page_id] > 0, f"page {page_id} is nobody's"
            self._num_references[page_id] -= 1
            if self._num_references[page_id] == 0:
                if page_id in self._hash_of_page:
                    self._cached[page_id] = None
                else:
                    self._free.append(page_id)

    def check(self) -> None:
        """Asserts what must always hold: every page in one state, and an index that agrees with itself."""
        used = {page_id for page_id, count in enumerate(self._num_references) if count > 0}
        states = [*self._free, *self._cached, *used]
        assert sorted(states) == list(range(self.num_pages)), "free + cached + used is not every page once"
        assert min(self._num_references) >= 0, "a reference count below zero"
        assert self.num_used == len(used), (self.num_used, len(used))
        assert {page_hash: page_id for page_id, page_hash in self._hash_of_page.items()} == self._page_of_hash
        assert set(self._hash_of_page) >= set(self._cached), "a cached page that cannot be matched"
        assert not set(self._hash_of_page) & set(self._free), "a free page that can be matched"

    def _evict(self) -> int:
        page_id, _ = self._cached.popitem(last=False)
        del self._page_of_hash[self._hash_of_page.pop(page_id)]
        return page_id
