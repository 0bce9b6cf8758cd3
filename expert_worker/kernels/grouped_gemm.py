"""The MLPs of several experts over rows sorted by expert, on a GPU, in two launches of `grouped_kernels`.

    h = gelu(x W^T) * (x V^T)
    y = h W2^T

Which variant runs follows from the device and the tensors: blocks fetched by the copy engine where it exists and the
tensors suit it, through pointers elsewhere; how it is cut from `grouped_tiles`.

Weights may be float8_e4m3fn with one scale per output channel. Rows then stay bfloat16 and weights are widened in the
kernel, or rows are quantised too, before each product, and multiplied as they are.

Which rows make a tile is worked out on the host, where the counts are. Searching prefix sums of the counts in the
kernel would take a transfer too, spare pieces of work, and a loop at the head of every one.

Shapes: N rows, E experts held, D hidden, F ffn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from expert_worker.kernels.grouped_fp8 import quantise_rows
from expert_worker.kernels.grouped_kernels import grouped_kernel
from expert_worker.kernels.grouped_tiles import (
    Blocks,
    Classes,
    TileClass,
    classes_for,
    fixed_class,
    has_tiles,
    tile_class,
    tile_table,
)
from expert_worker.kernels.reference import ChannelScales, assert_consistent
from grokmoe.model_config import Gelu

ALIGNMENT = 16
"""Bytes that a row of a tensor must be a multiple of for the copy engine."""


class Device(NamedTuple):
    """What the launch must know of a device. family: see `grouped_tiles`. has_tma: whether it has a copy engine.
    has_fp8: whether it knows float8_e4m3fn; where it does not, weights are widened bit by bit."""

    name: str
    family: str
    num_processors: int
    has_tma: bool
    has_fp8: bool


def describe(device: torch.device) -> Device:
    """The device that kernels run on. Without a GPU: what the compiler compiles for; in the interpreter the oldest."""
    if device.type == "cpu":
        return Device("interpreter", "sm_80", 1, False, True)
    target = triton.runtime.driver.active.get_current_target()
    name, num_processors = str(target.arch), 1
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, num_processors = properties.name, properties.multi_processor_count
    if target.backend == "hip":
        return Device(name, "gfx942", num_processors, has_tma=False, has_fp8=True)
    family = "sm_100" if target.arch >= 100 else "sm_90" if target.arch >= 90 else "sm_80"
    return Device(name, family, num_processors, has_tma=target.arch >= 90, has_fp8=target.arch >= 89)


def can_compute(device: torch.device, rows: torch.dtype, weights: torch.dtype, rows_in_8_bits: bool) -> bool:
    """Whether there is a kernel for such rows and weights on a device."""
    found = describe(device)
    has_products = found.has_fp8 or not rows_in_8_bits
    return has_products and has_tiles(found.family, types_of(rows, weights, rows_in_8_bits))


def expert_mlp(
    rows_ND: torch.Tensor,
    counts_E: Sequence[int],
    gate_EFD: torch.Tensor,
    up_EFD: torch.Tensor,
    down_EDF: torch.Tensor,
    gelu: Gelu,
    fixed_tiles: bool = False,
    scales: ChannelScales | None = None,
    rows_in_8_bits: bool = False,
) -> torch.Tensor:
    """Passes each row through the MLP of its expert. Arguments and result: see `reference.expert_mlp`.

    fixed_tiles: whether all calls use one tile, so that a row's bits do not depend on the rows beside it.

    The innermost stride of every tensor must be 1; the others are free, so slices of F or D need no copy.
    """
    assert_consistent(rows_ND, counts_E, gate_EFD, up_EFD, down_EDF, scales)
    h_NF = rows_ND.new_empty(len(rows_ND), gate_EFD.shape[1])
    out_ND = rows_ND.new_empty(rows_ND.shape)
    weights = (gate_EFD, up_EFD, down_EDF)
    launch(rows_ND, counts_E, *weights, gelu, h_NF, out_ND, fixed_tiles, scales, rows_in_8_bits)
    return out_ND


def launch(
    rows_ND: torch.Tensor,
    counts_E: Sequence[int],
    gate_EFD: torch.Tensor,
    up_EFD: torch.Tensor,
    down_EDF: torch.Tensor,
    gelu: Gelu,
    h_NF: torch.Tensor,
    out_ND: torch.Tensor,
    fixed_tiles: bool = False,
    scales: ChannelScales | None = None,
    rows_in_8_bits: bool = False,
    classes: Classes | None = None,
) -> None:
    """Queues the kernels on the current stream; h_NF and out_ND are overwritten. Does not wait.

    classes: of tiles, instead of those of the table.
    """
    for tensor in (rows_ND, gate_EFD, up_EFD, down_EDF, h_NF, out_ND):
        assert tensor.stride(-1) == 1, f"innermost stride is {tensor.stride(-1)}, must be 1"
    if len(rows_ND) == 0:
        return
    device = describe(rows_ND.device)
    if classes is None:
        classes = classes_for(device.name, device.family, types_of(rows_ND.dtype, gate_EFD.dtype, rows_in_8_bits))
    shape = fixed_class(classes) if fixed_tiles else tile_class(counts_E, classes)
    tiles = tile_table(counts_E, shape.rows)
    # Pinned and non-blocking: a copy from pageable memory would wait for the kernels queued before it.
    table = torch.tensor(tiles, dtype=torch.int32, pin_memory=rows_ND.is_cuda)
    table = table.to(rows_ND.device, non_blocking=True)
    gate_scale, up_scale, down_scale = (None, None, None) if scales is None else scales

    with torch.cuda.device_of(rows_ND):
        x, x_scale = quantise_rows(rows_ND) if rows_in_8_bits else (rows_ND, None)
        product = _Product(device, table, shape)
        product.launch(h_NF, x, x_scale, (gate_EFD, up_EFD), (gate_scale, up_scale), shape.gate_up, gelu is Gelu.TANH)
        h, h_scale = quantise_rows(h_NF) if rows_in_8_bits else (h_NF, None)
        product.launch(out_ND, h, h_scale, (down_EDF,), (down_scale,), shape.down, False)


def types_of(rows: torch.dtype, weights: torch.dtype, rows_in_8_bits: bool = False) -> str:
    """The key of `grouped_tiles.classes_for`."""
    rows = weights if rows_in_8_bits else rows
    names = [str(dtype).removeprefix("torch.") for dtype in (rows, weights)]
    return names[0] if rows == weights else " ".join(names)


class _Product:
    """A grouped product of one call's rows: what both launches have in common."""

    def __init__(self, device: Device, tiles: torch.Tensor, shape: TileClass) -> None:
        self._device, self._tiles, self._shape = device, tiles, shape

    def launch(
        self,
        out_NC: torch.Tensor,
        x_NK: torch.Tensor,
        x_scale_N: torch.Tensor | None,
        weights_ECK: Sequence[torch.Tensor],
        scales_EC: Sequence[torch.Tensor | None],
        blocks: Blocks,
        tanh: bool,
    ) -> None:
        """One weight: out = x w^T. Two: the gated form."""
        shape, (_, C, K) = self._shape, weights_ECK[0].shape
        if weights_ECK[0].dtype is torch.float8_e4m3fn and not self._device.has_fp8:
            weights_ECK = [weight.view(torch.uint8) for weight in weights_ECK]
        x: Any = x_NK
        sources: list[Any] = list(weights_ECK)
        tma = self._device.has_tma and _suits_tma(x_NK, *weights_ECK)
        if tma:
            x = TensorDescriptor.from_tensor(x_NK, [shape.rows, blocks.depth])
            sources = [TensorDescriptor.from_tensor(w.view(-1, K), [blocks.columns, blocks.depth]) for w in weights_ECK]
        num_pieces = len(self._tiles) * triton.cdiv(C, blocks.columns)
        num_programs = min(num_pieces, self._device.num_processors * blocks.per_processor)
        w, v = weights_ECK[0], weights_ECK[-1]
        grouped_kernel[(num_programs,)](
            x, sources[0], sources[-1], out_NC, self._tiles,
            self._tiles if x_scale_N is None else x_scale_N,
            *(self._tiles if scale is None else scale for scale in (scales_EC[0], scales_EC[-1])),
            len(self._tiles), K, C,
            x_NK.stride(0), w.stride(0), w.stride(1), v.stride(0), v.stride(1), out_NC.stride(0),
            GATED=len(weights_ECK) == 2, TANH=tanh, SWAP=shape.swap, TMA=tma,
            HAS_SCALES=scales_EC[0] is not None, HAS_ROW_SCALES=x_scale_N is not None,
            BLOCK_N=shape.rows, BLOCK_C=blocks.columns, BLOCK_K=blocks.depth,
            num_warps=blocks.num_warps, num_stages=blocks.num_stages,
        )  # fmt: skip


def _suits_tma(x_NK: torch.Tensor, *weights_ECK: torch.Tensor) -> bool:
    """Whether the copy engine can fetch from these tensors, and has something to gain: float32 is computed by the
    ordinary units, for which pointers are as good."""
    tensors = (x_NK, *weights_ECK)
    return (
        x_NK.dtype is not torch.float32
        and all(
            tensor.data_ptr() % ALIGNMENT == 0 and tensor.stride(-2) * tensor.element_size() % ALIGNMENT == 0
            for tensor in tensors
        )
        and all(weight.is_contiguous() for weight in weights_ECK)
    )
