"""Lists of addresses: what a file says, what has changed between two lists, which workers one entry names. Pure."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable

STAGE_JOINT = "+"
"""Between the addresses of workers that make one pipeline."""

_STAGE = re.compile(r"unix:.+|[^/]+:\d+")


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


def stages_of(address: str) -> tuple[str, ...]:
    """The workers that an entry of a list of attention workers names: one, or the stages of a pipeline, `a:1+b:1`.

    Sorted: in whatever order they are named, it is the same pipeline. Raises ValueError for a stage that is no address
    of one worker, or is named twice.
    """
    stages = [stage.strip() for stage in address.split(STAGE_JOINT)]
    if len(stages) == 1:
        return (address.strip(),)
    for stage in stages:
        if not _STAGE.fullmatch(stage):
            raise ValueError(
                f"{address}: stages of a pipeline are named one by one, host:port or unix:/path, with {STAGE_JOINT} "
                f"between them; {stage!r} is none"
            )
    if len(set(stages)) < len(stages):
        raise ValueError(f"{address}: names a stage twice")
    return tuple(sorted(stages))


def pipelines(addresses: Iterable[str]) -> list[str]:
    """Entries of a list of attention workers, each written the one way that it is known by; see `stages_of`.

    Raises ValueError also for a worker that two of them name: it can be in one pipeline only.
    """
    found = list(dict.fromkeys(STAGE_JOINT.join(stages_of(address)) for address in addresses))
    named: dict[str, str] = {}
    for entry in found:
        for stage in stages_of(entry):
            if stage in named:
                raise ValueError(f"{stage} is in {named[stage]} and in {entry}")
            named[stage] = entry
    return found
