"""The holes of any model, filled by its plain reference."""

from __future__ import annotations

import torch

from attention_worker.engine import MoeInput
from grokmoe.checkpoint import Checkpoint
from grokmoe.reference import Reference, Trace


class DenseExperts:
    """reference: the whole model."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.reference = Reference.from_checkpoint(checkpoint)

    def fill(self, at: MoeInput) -> torch.Tensor:
        """The MoE output of a hole, float32."""
        return self.reference._moe(at.layer, at.x_TD, Trace())
