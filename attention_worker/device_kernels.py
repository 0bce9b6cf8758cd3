"""What a block computes beside its products, per kind of device: the one place that decides.

Shapes: T tokens, D hidden, H query heads, K KV heads, d head size, X = (H + 2 K) d, P pages, S slots of a page; I
inputs and O outputs of a product.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from attention_worker.kernels import reference
from attention_worker.kernels.low_rank import Projections, Segments
from attention_worker.layers import Rope, Rotation, rms_norm
from attention_worker.step_batch import StepBatch


class DeviceKernels(Protocol):
    """The operations. `PlainKernels` says what each computes."""

    def norm(self, h_TD: torch.Tensor, gain_D: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor: ...

    def add_normed(self, h_TD: torch.Tensor, y_TD: torch.Tensor, gain_D: torch.Tensor, eps: float) -> None: ...

    def add_normed_then_norm(
        self,
        h_TD: torch.Tensor,
        y_TD: torch.Tensor,
        y_gain_D: torch.Tensor,
        h_gain_D: torch.Tensor,
        eps: float,
        dtype: torch.dtype,
    ) -> torch.Tensor: ...

    def rotate_and_store(
        self, qkv_TX: torch.Tensor, rotation: Rotation, k_KPSd: torch.Tensor, v_KPSd: torch.Tensor, batch: StepBatch
    ) -> torch.Tensor: ...

    def attend(
        self,
        q_THd: torch.Tensor,
        k_KPSd: torch.Tensor,
        v_KPSd: torch.Tensor,
        batch: StepBatch,
        scale: float,
        cap: float,
    ) -> torch.Tensor: ...

    def add_low_rank(
        self, y_TO: torch.Tensor, x_TI: torch.Tensor, segments: Segments, layer: int, projections: Projections
    ) -> None: ...


class PlainKernels:
    """In plain torch, for every device."""

    def norm(self, h_TD: torch.Tensor, gain_D: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
        """The residual, float32, as the input of a block."""
        return rms_norm(h_TD, gain_D, eps, dtype)

    def add_normed(self, h_TD: torch.Tensor, y_TD: torch.Tensor, gain_D: torch.Tensor, eps: float) -> None:
        """Adds the norm of a block's output to the residual, in place."""
        h_TD += rms_norm(y_TD, gain_D, eps, torch.float32)

    def add_normed_then_norm(
        self,
        h_TD: torch.Tensor,
        y_TD: torch.Tensor,
        y_gain_D: torch.Tensor,
        h_gain_D: torch.Tensor,
        eps: float,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """`add_normed` with y_gain, then `norm` of the sum with h_gain: from one block into the next."""
        self.add_normed(h_TD, y_TD, y_gain_D, eps)
        return self.norm(h_TD, h_gain_D, eps, dtype)

    def rotate_and_store(
        self, qkv_TX: torch.Tensor, rotation: Rotation, k_KPSd: torch.Tensor, v_KPSd: torch.Tensor, batch: StepBatch
    ) -> torch.Tensor:
        """Queries and keys turned by their positions' angles; keys and values into their slots. Returns q_THd."""
        num_kv_heads, _, _, head_dim = k_KPSd.shape
        x_TXd = qkv_TX.view(len(qkv_TX), -1, head_dim)
        q_THd, k_TKd, v_TKd = x_TXd.split((x_TXd.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads), dim=1)
        for pages, new_TKd in ((k_KPSd, Rope.rotate(k_TKd, rotation)), (v_KPSd, v_TKd)):
            pages.view(num_kv_heads, -1, head_dim).index_copy_(1, batch.slots_T, new_TKd.transpose(0, 1))
        return Rope.rotate(q_THd, rotation)

    def attend(
        self,
        q_THd: torch.Tensor,
        k_KPSd: torch.Tensor,
        v_KPSd: torch.Tensor,
        batch: StepBatch,
        scale: float,
        cap: float,
    ) -> torch.Tensor:
        """See `reference.paged_attention`."""
        return reference.paged_attention(q_THd, k_KPSd, v_KPSd, batch, scale, cap)

    def add_low_rank(
        self, y_TO: torch.Tensor, x_TI: torch.Tensor, segments: Segments, layer: int, projections: Projections
    ) -> None:
        """See `reference.add_low_rank`."""
        reference.add_low_rank(y_TO, x_TI, segments, layer, projections)


class _PagedKernels:
    """What those that are not plain have alike: a module for paged attention and one for the rotary embedding."""

    _attention: Any
    _rotary: Any
    _deterministic: bool

    def rotate_and_store(
        self, qkv_TX: torch.Tensor, rotation: Rotation, k_KPSd: torch.Tensor, v_KPSd: torch.Tensor, batch: StepBatch
    ) -> torch.Tensor:
        """See PlainKernels."""
        return self._rotary.rotate_and_store(qkv_TX, rotation.cos, rotation.sin, k_KPSd, v_KPSd, batch.slots_T)

    def attend(
        self,
        q_THd: torch.Tensor,
        k_KPSd: torch.Tensor,
        v_KPSd: torch.Tensor,
        batch: StepBatch,
        scale: float,
        cap: float,
    ) -> torch.Tensor:
        """See PlainKernels."""
        return self._attention.paged_attention(q_THd, k_KPSd, v_KPSd, batch, scale, cap, self._deterministic)


class CpuKernels(_PagedKernels):
    """Compiled loops, and for long chunks matrix products."""

    def __init__(self, deterministic: bool = False) -> None:
        """deterministic: see `kernels.cpu`."""
        from attention_worker.kernels import (
            cpu,
            cpu_lora,
            cpu_norm,
            cpu_rotary,
        )  # numba is loaded only where it is used

        self._attention, self._rotary, self._deterministic = cpu, cpu_rotary, deterministic
        self.norm, self.add_normed, self.add_low_rank = cpu_norm.norm, cpu_norm.add_normed, cpu_lora.add_low_rank

    def add_normed_then_norm(
        self,
        h_TD: torch.Tensor,
        y_TD: torch.Tensor,
        y_gain_D: torch.Tensor,
        h_gain_D: torch.Tensor,
        eps: float,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """See PlainKernels."""
        self.add_normed(h_TD, y_TD, y_gain_D, eps)
        return self.norm(h_TD, h_gain_D, eps, dtype)


class TritonKernels(_PagedKernels):
    """Triton, for GPUs."""

    def __init__(self, deterministic: bool = False) -> None:
        """deterministic: see `kernels.device_tiles`."""
        # Triton is not installed everywhere.
        from attention_worker.kernels import triton_attention, triton_lora, triton_norm, triton_rotary

        self._attention, self._rotary, self._deterministic = triton_attention, triton_rotary, deterministic
        self.norm, self.add_normed = triton_norm.norm, triton_norm.add_normed
        self.add_normed_then_norm = triton_norm.add_normed_then_norm
        self.add_low_rank = triton_lora.add_low_rank


def select_kernels(device: torch.device | str, deterministic: bool = False) -> DeviceKernels:
    """The kernels for tensors on `device`. deterministic: whether a row's bits may depend on the rows beside it; plain
    attention computes chunks apart."""
    kind = torch.device(device).type
    if kind == "cpu":
        return CpuKernels(deterministic)
    return TritonKernels(deterministic) if kind == "cuda" else PlainKernels()
