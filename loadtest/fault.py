"""A worker that is disturbed in the middle of a run, and what that did.

kill:expert:1@10s       SIGKILL to expert worker 1, ten seconds after the first request was due
term:router:0@10s       SIGTERM
stop:attention:0@5s+2s  SIGSTOP, and SIGCONT two seconds later
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import re
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grokmoe.errors import ConfigError
from loadtest.metrics import tokens_per_second
from loadtest.record import Outcome, RequestRecord
from loadtest.slo import Slo
from loadtest.window import Window

SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "stop": signal.SIGSTOP}

PATTERN = re.compile(r"(kill|term|stop):([a-z]+):(\d+)@(\d+(?:\.\d+)?)s?(?:\+(\d+(?:\.\d+)?)s?)?")

SPAN = 0.25
"""Seconds over which tokens are counted when recovery is looked for."""

RECOVERED = 0.9
"""Share of the tokens/s before the fault that counts as back."""


@dataclasses.dataclass(frozen=True)
class Fault:
    """What is done to whom, and when, seconds of the run. lasts: of a stop."""

    kind: str
    role: str
    index: int
    at: float
    lasts: float | None = None


def parse_fault(text: str) -> Fault:
    """As in the module's docstring."""
    match = PATTERN.fullmatch(text)
    if match is None:
        raise ConfigError(f"fault {text!r} is not KIND:ROLE:INDEX@SECONDSs, such as kill:expert:1@10s")
    kind, role, index, at, lasts = match.groups()
    if (kind == "stop") != (lasts is not None):
        raise ConfigError(f"fault {text!r}: a stop, and only a stop, says how long it lasts: stop:{role}:{index}@5s+2s")
    return Fault(kind, role, int(index), float(at), None if lasts is None else float(lasts))


@dataclasses.dataclass(frozen=True)
class ClusterState:
    """What `grokmoe up --state FILE` has written. processes: (role, index) to process id."""

    address: str
    metrics: tuple[str, ...]
    processes: Mapping[tuple[str, int], int]


def read_state(path: Path) -> ClusterState:
    """ConfigError: not such a file."""
    try:
        state = json.loads(path.read_text())
        processes = {(each["role"], each["index"]): each["pid"] for each in state["processes"]}
        metrics = tuple(each["metrics"] for each in state["processes"] if each["metrics"])
        return ClusterState(state["address"], metrics, processes)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"state {path}: {error}") from error


def check_faults(faults: Sequence[Fault], state: ClusterState) -> None:
    """ConfigError: there is no such process."""
    for fault in faults:
        if (fault.role, fault.index) not in state.processes:
            raise ConfigError(f"fault: {state.address} has no {fault.role} {fault.index}")


async def disturb(fault: Fault, state: ClusterState, begin: float) -> float:
    """Does it. Returns when, seconds of the run. begin: of the run, on the monotonic clock."""
    pid = state.processes[fault.role, fault.index]
    await asyncio.sleep(max(0.0, begin + fault.at - time.monotonic()))
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, SIGNALS[fault.kind])
    done = time.monotonic() - begin
    if fault.lasts is not None:
        try:
            await asyncio.sleep(fault.lasts)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    return done


def effect(
    at: float, records: Sequence[RequestRecord], undisturbed: Sequence[RequestRecord], slo: Slo
) -> dict[str, Any]:
    """What a fault at `at` did, against a run of the same plan without it."""
    hit = [record for record in records if record.sent <= at < record.end]
    gaps = [
        (sooner, later)
        for record in records
        for sooner, later in itertools.pairwise(record.arrivals)
        if later > at and record.scheduled <= at
    ]
    dip, recovery = _recovery(at, records)
    calm = {record.index: record.digest for record in undisturbed if record.outcome is Outcome.COMPLETED}
    compared = [record for record in records if record.outcome is Outcome.COMPLETED and record.index in calm]
    return {
        "at": at,
        "requests_under_way": len(hit),
        "requests_lost": sum(record.outcome is Outcome.FAILED for record in hit),
        "failed_after": sum(record.outcome is Outcome.FAILED for record in records if record.end >= at),
        "longest_stall_ms": max((later - sooner for sooner, later in gaps), default=0.0) * 1e3,
        "slo_attained": slo.attained(records),
        "slo_attained_undisturbed": slo.attained(undisturbed),
        "tokens_per_s_dip": dip,
        "recovery_seconds": recovery,
        "compared": len(compared),
        "changed": sum(record.digest != calm[record.index] for record in compared),
    }


def _recovery(at: float, records: Sequence[RequestRecord]) -> tuple[float | None, float | None]:
    """Lowest share of the tokens/s before that a span after the fault had, and seconds until they were back."""
    before = tokens_per_second(records, Window(min(1.0, at / 2), at), SPAN)
    mean = sum(before) / len(before) if before else 0.0
    last = max((record.scheduled for record in records), default=0.0)
    after = tokens_per_second(records, Window(at, max(at, last)), SPAN)
    if not mean or len(after) < 2:
        return None, None
    back = [index for index, pair in enumerate(itertools.pairwise(after)) if min(pair) >= RECOVERED * mean]
    # Back at once means that no span was below: then there was nothing to recover from.
    return min(after) / mean, back[0] * SPAN if back else None
