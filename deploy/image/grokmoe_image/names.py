"""Waits until names resolve: a pod's name behind a headless service does so when the pod is ready, and not before.

A router that starts needs a holder of every expert, not every holder: `--any=a,b` waits for one of several names.
"""

from __future__ import annotations

import argparse
import socket
import sys
import time
from collections.abc import Callable, Sequence

PAUSE = 1.0
"""Seconds between two rounds: the resolver of a cluster answers from memory."""

REPORT_EVERY = 30.0
"""Seconds between two lines about what is still missing."""


def resolves(name: str) -> bool:
    """Whether the name has an address now. A resolver that does not answer counts as no."""
    try:
        return bool(socket.getaddrinfo(name, None))
    except OSError:
        return False


def missing(groups: Sequence[Sequence[str]], is_there: Callable[[str], bool]) -> list[Sequence[str]]:
    """The groups of which no name is there. A name is asked for once a round."""
    known = {name: is_there(name) for name in dict.fromkeys(name for group in groups for name in group)}
    return [group for group in groups if not any(known[name] for name in group)]


def wait(groups: Sequence[Sequence[str]], is_there: Callable[[str], bool], sleep: Callable[[float], None]) -> None:
    """Returns when every group has a name that is there."""
    since_report = REPORT_EVERY
    while left := missing(groups, is_there):
        if since_report >= REPORT_EVERY:
            print(f"waiting for {'; '.join(' or '.join(group) for group in left)}", file=sys.stderr, flush=True)
            since_report = 0.0
        sleep(PAUSE)
        since_report += PAUSE


def main(arguments: Sequence[str]) -> int:
    """The command `await-names`."""
    parser = argparse.ArgumentParser("await-names", description="Waits until one name of every group resolves.")
    parser.add_argument("--any", action="append", default=[], metavar="NAME,...", help="a group; may be given again")
    groups = [[name for name in group.split(",") if name] for group in parser.parse_args(arguments).any]
    wait([group for group in groups if group], resolves, time.sleep)
    return 0
