"""Reads a worker's experts from a checkpoint: nothing else of it is touched, and one tensor at a time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from expert_worker.experts import ExpertSet
from grokmoe import tensor_names
from grokmoe.checkpoint import Checkpoint
from grokmoe.errors import Cancelled

logger = logging.getLogger(__name__)


def load(experts: ExpertSet, checkpoint: Checkpoint, is_stopping: Callable[[], bool] = lambda: False) -> None:
    """Fills `experts`. Beyond what it keeps the host holds one tensor, in the stored and in the wanted type.

    is_stopping: asked between tensors. Raises Cancelled when it says so, CheckpointError for a damaged file.
    """
    began = time.monotonic()
    for layer, expert_ids in experts.held.items():
        for expert in expert_ids:
            for linear in tensor_names.EXPERT_LINEARS:
                if is_stopping():
                    raise Cancelled("stopped while loading")
                weight = checkpoint.read(tensor_names.expert(layer, expert, linear), experts.dtype)
                experts.put(layer, expert, linear, weight)
    num_experts = sum(map(len, experts.held.values()))
    logger.info("loaded %d experts in %d layers in %.1f s", num_experts, len(experts.held), time.monotonic() - began)
