"""One attention worker and its lanes: what is computed on it, and what becomes of its sequences whatever it does.

cell: the worker's life; hooks: what it needs of the engine; lanes: a task for each; flights: the steps under way;
outcome: how a step has ended; settling, delivery, faulty_chunks: what follows for its requests; tempo: how long an
answer may take, and whether the worker is slow; loss: what is counted when it is lost; leaving: to a neighbour.
"""

from router.cell.cell import AttentionCell
from router.cell.hooks import CellHooks, MakeHole

__all__ = ["AttentionCell", "CellHooks", "MakeHole"]
