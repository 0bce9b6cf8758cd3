"""Which expert workers hold which experts, whole or in slices. Pure tables.

slicing: in how many slices an expert is used. spreading: a placement to start with. table: who holds what, and which of
them a call uses.
"""

from grokmoe.expert_ranges import ExpertLayers, Pair, pairs_of, ranges_of
from router.placement.slicing import is_held
from router.placement.spreading import spread
from router.placement.table import NOBODY, Choice, Placement, check_held

__all__ = [
    "NOBODY",
    "Choice",
    "ExpertLayers",
    "Pair",
    "Placement",
    "check_held",
    "is_held",
    "pairs_of",
    "ranges_of",
    "spread",
]
