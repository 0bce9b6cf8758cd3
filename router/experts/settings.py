"""Named limits of calls to expert workers."""

from __future__ import annotations

import dataclasses

from router.probing import ProbeSettings
from router.rebalancing import RebalanceSettings


@dataclasses.dataclass(frozen=True)
class ExpertPoolSettings:
    """Times in seconds."""

    replica_wait: float = 30.0
    """How long a call waits for a holder of its experts when none is ready."""
    probe_interval: float = 0.1
    """First pause of probing, see `ProbeSettings`."""
    probe_interval_max: float = 2.0
    """Longest pause of probing."""
    dead_after: float = 30.0
    """Away for so long a worker is called dead."""
    deadline_quantile: float = 0.99
    """The observed latency from which a call's deadline follows."""
    deadline_factor: float = 4.0
    """A call is late after this many times that latency. A false alarm costs one call sent twice, a long deadline
    costs every sequence of the step; processes that share cores make each other two to three times slower."""
    deadline_floor: float = 0.25
    """No deadline is shorter: a busy machine holds a process up for a tenth of a second now and then."""
    deadline_ceiling: float = 60.0
    """A call is given up after this long even if nobody else can take it."""
    deadline_cold: float = 5.0
    """Deadline while too few calls have been observed: the first ones pack weights and touch fresh memory."""
    hedge_quantile: float = 0.0
    """Send the same rows to a second holder once a call takes longer than this quantile; 0: never."""
    hedge_share: float = 0.05
    """Most hedged calls, as a share of all: when everything is slow, twice the work makes it slower."""
    check_finite: bool = True
    """Look for NaN and infinity in every answer. Costs one sum over it."""

    load_timeout: float = 1800.0
    """How long a worker may take to load what a move brings: 77 GB, an expert of Grok-1, from a disk of 50 MB/s."""
    unload_patience: float = 60.0
    """How long a worker that is away is waited for, to have it give up what was moved from it."""
    rebalance: RebalanceSettings = dataclasses.field(default_factory=RebalanceSettings)
    """When experts are moved for balance."""

    @property
    def probe(self) -> ProbeSettings:
        """The limits of the way back."""
        return ProbeSettings(self.probe_interval, self.probe_interval_max, self.dead_after)
