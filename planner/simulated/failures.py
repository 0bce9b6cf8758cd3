"""Who is lost when, and for how long: said one by one, or drawn from the mean time between two failures of a worker."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import numpy as np

from grokmoe.errors import ConfigError

ROLES = ("expert", "attention", "router")

_PATTERN = re.compile(r"(\w+):(\d+)@(\d+(?:\.\d+)?)s?(?:\+(\d+(?:\.\d+)?)s?)?", re.ASCII)

HOUR = 3600.0


@dataclasses.dataclass(frozen=True, order=True)
class Failure:
    """at: seconds of the simulation. lasts: until it is back; None: it does not come back."""

    at: float
    role: str
    index: int
    lasts: float | None = None


def parse_failure(text: str) -> Failure:
    """`expert:3@10s+30s`: expert worker 3 is lost after ten seconds and back thirty seconds later. Raises ConfigError
    for what is no such text."""
    match = _PATTERN.fullmatch(text)
    if match is None or match[1] not in ROLES:
        raise ConfigError(f"failure {text!r} is not ROLE:INDEX@SECONDSs+SECONDSs, ROLE one of {', '.join(ROLES)}")
    return Failure(float(match[3]), match[1], int(match[2]), None if match[4] is None else float(match[4]))


def draw_failures(
    counts: Mapping[str, int], mean_hours: float, lasts: float, seconds: float, seed: int
) -> list[Failure]:
    """Each worker fails after an exponential time of this mean, is back after `lasts` seconds, and so on."""
    rng = np.random.default_rng([seed, 2])
    found = []
    for role, count in counts.items():
        for index in range(count):
            time = float(rng.exponential(mean_hours * HOUR))
            while time < seconds:
                found.append(Failure(time, role, index, lasts))
                time += lasts + float(rng.exponential(mean_hours * HOUR))
    return sorted(found)
