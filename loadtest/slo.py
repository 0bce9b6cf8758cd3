"""Service level objectives: which requests are good, and whether enough of them are."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from grokmoe.errors import ConfigError
from loadtest.latencies import PER_REQUEST
from loadtest.record import Outcome, RequestRecord

JUDGED = ("ttft", "tpot", "e2el")
"""What an objective may be about."""

MLPERF_MIXTRAL = ("ttft:2000", "tpot:200")
"""Limits of MLPerf Inference for Mixtral 8x7B in its server scenario: the mixture of experts that is published closest
to Grok-1."""

MLPERF_SHARE = 0.99
"""Its limits are for the 99th percentile."""


@dataclasses.dataclass(frozen=True)
class Slo:
    """A request is good if it completed within all `limits`, in seconds by name.

    share: of the requests that must be good for the objectives to hold.
    """

    limits: tuple[tuple[str, float], ...]
    share: float = MLPERF_SHARE

    def is_good(self, record: RequestRecord) -> bool:
        """A request without a latency, such as the TPOT of a single token, is within its limit."""
        if record.outcome is not Outcome.COMPLETED:
            return False
        return all((PER_REQUEST[name](record) or 0.0) <= limit for name, limit in self.limits)

    def attained(self, records: Sequence[RequestRecord]) -> float:
        """Share of the requests that are good; those that the client left on purpose do not count."""
        judged = [record for record in records if record.outcome is not Outcome.CANCELLED]
        return sum(map(self.is_good, judged)) / len(judged) if judged else 0.0

    def holds(self, records: Sequence[RequestRecord]) -> bool:
        """Whether enough of them are good."""
        return self.attained(records) >= self.share


def parse_slo(pairs: Sequence[str], share: float = MLPERF_SHARE) -> Slo:
    """pairs: `ttft:2000`, milliseconds."""
    if not 0 < share <= 1:
        raise ConfigError(f"slo_share is {share}, must be in (0, 1]")
    limits = {}
    for pair in pairs:
        name, _, limit = pair.partition(":")
        if name not in JUDGED:
            raise ConfigError(f"goodput {pair!r}: {name!r} is none of {', '.join(JUDGED)}")
        try:
            limits[name] = float(limit) / 1e3
        except ValueError:
            raise ConfigError(f"goodput {pair!r}: {limit!r} is no number of milliseconds") from None
        if not limits[name] >= 0:
            raise ConfigError(f"goodput {pair!r}: a limit cannot be negative")
    return Slo(tuple(limits.items()), share)
