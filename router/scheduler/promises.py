"""Pages that are being computed now: who needs one waits for it, and gets it for nothing a step or two later."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from router.sequence import Sequence


class Promises:
    """By the hash of a full page: the running sequence that is about to compute it. Of two that do, the first."""

    def __init__(self) -> None:
        self._by_hash: dict[bytes, Sequence] = {}

    def __contains__(self, page_hash: bytes) -> bool:
        return page_hash in self._by_hash

    def make(self, sequence: Sequence, page_hashes: Iterable[bytes]) -> None:
        """The sequence is going to compute these pages."""
        for page_hash in page_hashes:
            self._by_hash.setdefault(page_hash, sequence)

    def keep(self, page_hash: bytes) -> None:
        """The page is there."""
        self._by_hash.pop(page_hash, None)

    def withdraw(self, sequence: Sequence) -> None:
        """The sequence computes nothing more for now."""
        for page_hash in sequence.page_hashes:
            if self._by_hash.get(page_hash) is sequence:
                del self._by_hash[page_hash]

    def clear(self) -> None:
        """Nobody computes anything."""
        self._by_hash.clear()

    def check(self, holders: Collection[Sequence]) -> None:
        """Asserts that only those that hold pages have promised any."""
        for sequence in self._by_hash.values():
            assert sequence in holders, f"a page is promised by who will not compute it: {sequence}"
