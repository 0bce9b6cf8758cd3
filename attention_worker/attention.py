"""Which attention kernel runs on which device: the one place that decides."""

from __future__ import annotations

import functools
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


def select_attention(device: torch.device | str, deterministic: bool = False) -> PagedAttention:
    """The kernel for tensors on `device`. deterministic: see `kernels.cpu`; the plain one computes chunks apart."""
    if torch.device(device).type != "cpu":
        return reference.paged_attention
    return functools.partial(cpu.paged_attention, deterministic=True) if deterministic else cpu.paged_attention
