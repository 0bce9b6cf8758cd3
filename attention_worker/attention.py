"""Which attention kernel runs on which device: the one place that decides."""

from __future__ import annotations

from typing import Protocol

import torch

from attention_worker.kernels import cpu, reference
from attention_worker.step_batch import StepBatch


class PagedAttention(Protocol):
    """The signature of every kernel; `kernels.reference` says what it computes."""

    def __call__(
        self,
        q_THd: torch.Tensor,
        k_KPSd: torch.Tensor,
        v_KPSd: torch.Tensor,
        batch: StepBatch,
        scale: float,
        cap: float,
    ) -> torch.Tensor: ...


def select_attention(device: torch.device | str) -> PagedAttention:
    """The kernel for tensors on `device`."""
    return cpu.paged_attention if torch.device(device).type == "cpu" else reference.paged_attention
