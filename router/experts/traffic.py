"""How many rows experts and workers got lately, looked up in the books that are kept anyway. Letters: L layers,
E experts, W workers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from router.experts.member import ExpertMember
from router.experts.members import ExpertMembers
from router.rebalancing import Rate, RebalanceSettings
from router.rebalancing.situation import imbalance


class Traffic:
    """Rates over a window that fades. `look` now and then; nothing is done per call."""

    def __init__(self, members: ExpertMembers, settings: RebalanceSettings) -> None:
        self._members, self._settings = members, settings
        self._experts = Rate(settings.window)
        self._workers: dict[ExpertMember, Rate] = {}
        self._placement_version = 0

    def look(self, now: float, rows_LE: Sequence[Sequence[int]]) -> None:
        """Takes the books. rows_LE: rows of every expert since start. now: seconds."""
        members = self._members
        self._experts.observe(now, np.array(rows_LE, dtype=np.float64))
        if self._placement_version != members.placement_version:
            # Shares of the old placement say nothing about the new one.
            self._placement_version = members.placement_version
            self._workers.clear()
        self._workers = {member: self._workers.get(member, Rate(self._settings.window)) for member in members.members}
        for member, rate in self._workers.items():
            sent = member.rows_sent
            rate.observe(now, np.array([sent[layer] for layer in range(members.config.num_layers)], dtype=np.float64))

    @property
    def is_enough(self) -> bool:
        """Whether the window has rows enough to say what is hot."""
        return self._experts.num_seen >= self._settings.min_rows

    def load_LE(self) -> list[list[float]] | None:
        """Rows per second of every expert. None: not looked at twice yet."""
        found = self._experts.per_second()
        return None if found is None else found.tolist()

    def rows_per_second(self, member: ExpertMember) -> float:
        """Of all layers together."""
        rate = self._workers.get(member)
        found = None if rate is None else rate.per_second()
        return 0.0 if found is None else float(found.sum())

    def imbalance(self) -> float:
        """Rows of the busiest worker in use over the mean one, layer by layer; 0: there were too few rows."""
        rates = [rate for member, rate in self._workers.items() if member.is_usable]
        if sum(rate.num_seen for rate in rates) < self._settings.min_rows:
            return 0.0
        columns = [rate.per_second() for rate in rates]
        return imbalance(np.stack([column for column in columns if column is not None], axis=1).tolist())
