"""The live expert workers: which are ready, which one a call uses, what happens when one fails.

settings, counters; latency: how long a call may take; member: one worker; members: joining, losing, coming back;
answers: whether one can be true; attempt: one call; hedging: a second one beside it; pool: rows out, rows back.
moves: experts from one worker to another; traffic: who gets how many rows; rebalancer: moves for balance.
"""

from router.experts.counters import Cause, ExpertCounters
from router.experts.member import ExpertMember
from router.experts.members import ExpertsUnavailable, SlicingChanged
from router.experts.moves import Move, MoveCost, Moves, Phase
from router.experts.pool import ExpertPool
from router.experts.rebalancer import Rebalanced, Rebalancer
from router.experts.settings import ExpertPoolSettings

__all__ = [
    "Cause",
    "ExpertCounters",
    "ExpertMember",
    "ExpertPool",
    "ExpertPoolSettings",
    "ExpertsUnavailable",
    "Move",
    "MoveCost",
    "Moves",
    "Phase",
    "Rebalanced",
    "Rebalancer",
    "SlicingChanged",
]
