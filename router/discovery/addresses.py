"""Lists of addresses: what a file says, and what has changed between two lists. Pure."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Changes:
    """What has to be done to turn one list into another: addresses in the order of their list."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.added or self.removed)


def changes(known: Iterable[str], found: Iterable[str]) -> Changes:
    """From what is known to what was found. Pure; an address that is named twice counts once."""
    before, now = dict.fromkeys(known), dict.fromkeys(found)
    return Changes(
        tuple(address for address in now if address not in before),
        tuple(address for address in before if address not in now),
    )


def parse_addresses(text: str) -> list[str]:
    """The contents of a file: a JSON list of strings, or one address per line; `#` begins a comment.

    Raises ValueError when it begins like JSON and is no such list.
    """
    if text.lstrip().startswith("["):
        found = json.loads(text)
        if not all(isinstance(address, str) and address.strip() for address in found):
            raise ValueError("holds something that is no address")
    else:
        found = [line.partition("#")[0] for line in text.splitlines()]
    return list(dict.fromkeys(address.strip() for address in found if address.strip()))
