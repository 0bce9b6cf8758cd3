"""Whether a worker is used."""

from __future__ import annotations

import enum


class WorkerState(enum.Enum):
    """JOINING: not described yet. READY: in use. SUSPECT: lost; no new work until it describes itself again."""

    JOINING = "joining"
    READY = "ready"
    SUSPECT = "suspect"
