"""Which expert workers hold which experts. Pure tables.

ranges: experts and their layers, as ranges and one by one. spreading: a placement to start with. table: who holds what,
and which of them a call uses.
"""

from router.placement.ranges import ExpertLayers, Pair, pairs_of, ranges_of
from router.placement.spreading import spread
from router.placement.table import NOBODY, Placement, check_held

__all__ = ["NOBODY", "ExpertLayers", "Pair", "Placement", "check_held", "pairs_of", "ranges_of", "spread"]
