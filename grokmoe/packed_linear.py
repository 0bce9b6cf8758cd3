"""y = x W^T with the weight laid out once for the device, instead of at every call.

On CPU oneDNN's blocked layout makes small batches two to three times as fast as a plain linear (docs/log.md). Its
entry points are private to torch, so they are tried once and a plain linear takes over where they fail.

A row's bits do not depend on the rows beside it: on x86 with AVX-512 oneDNN takes one path for all row counts but one
(see DEEPEST_SINGLE_ROW). A deterministic linear does not rely on that. It computes with few row counts only, and only
with those that it has seen to agree on this machine.

Letters: N rows, I inputs, O outputs.
"""

from __future__ import annotations

import functools

import torch
from torch.nn import functional

from grokmoe.model_config import Gelu

PACK_ROWS = 32
"""The row count oneDNN chooses its layout for. One layout serves all row counts, unless it is made for few: float32 is
up to three times as slow when made for 1, a few per cent for 8; 32, 128 and 512 are alike (docs/log.md)."""

DEEPEST_SINGLE_ROW = 1024
"""A single row of more inputs than this is summed up in another order than several rows are. It travels as two."""

FIXED_ROWS = 16
"""The row count that all others must agree with."""

ROW_COUNTS = (*range(1, 9), 10, 12, 14, 16, 20, 24, 28, 32, 48, 64, 96, 128, 256)
"""What a deterministic linear computes with, if they agree: rows are padded to the next, or cut by the largest."""


@functools.cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether this torch on this CPU has the private packed linear and it computes the right thing in this type.

    Asked by the thread that will compute, not at import: a second team of OpenMP threads in the process, be it ever so
    idle, makes libgomp think that the cores are taken, and every product four times as slow (docs/log.md).
    """
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    random = torch.Generator().manual_seed(0)
    weight, x, times = (torch.randn(shape, generator=random) / 4 for shape in ((16, 32), (3, 32), (3, 16)))
    weight, x, times = weight.to(dtype), x.to(dtype), times.to(dtype)
    expected = functional.gelu(functional.linear(x.float(), weight.float()))
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, PACK_ROWS)
        plain = torch.ops.mkldnn._linear_pointwise(x, packed, None, "gelu", [], "none")
        product = torch.ops.mkldnn._linear_pointwise.binary(x, times, packed, None, "mul")
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return torch.allclose(plain.float(), expected, tolerance, tolerance) and torch.allclose(
        product.float(), functional.linear(x.float(), weight.float()) * times.float(), tolerance, tolerance
    )


class PackedLinear:
    """One weight, packed for its device. Keeps no reference to the weight it was made from."""

    __slots__ = ("_is_packed", "_row_counts", "_weight", "dtype", "in_features", "out_features")

    is_loops = False

    def __init__(self, weight_OI: torch.Tensor, deterministic: bool = False) -> None:
        """weight_OI: as in the checkpoint, in the type to compute in.

        deterministic: find out which row counts agree (once per shape), and use no others. Must be made by the thread
        that will compute: the number of threads is part of what is found out.
        """
        self.out_features, self.in_features = weight_OI.shape
        self.dtype = weight_OI.dtype
        self._is_packed = weight_OI.device.type == "cpu" and can_pack(self.dtype)
        if self._is_packed:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous(), PACK_ROWS)
        else:
            self._weight = weight_OI.contiguous()
        self._row_counts: tuple[int, ...] = ()
        if deterministic:
            key = (self.dtype, self._is_packed, self.out_features, self.in_features, torch.get_num_threads())
            if key not in _agreeing:
                _agreeing[key] = _find_agreeing(self)
            self._row_counts = _agreeing[key]

    @property
    def device(self) -> torch.device:
        """Where the weight is, and what it is multiplied with must be."""
        device: torch.device = self._weight.device
        return device

    @property
    def row_counts(self) -> tuple[int, ...]:
        """Of a deterministic linear: the row counts it computes with, ascending. Of any other: empty."""
        return self._row_counts

    @torch.inference_mode()
    def __call__(
        self, x_NI: torch.Tensor, gelu: Gelu | None = None, times_NO: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x_NI -> y_NO, then its GELU if `gelu` is given, or its product with `times_NO`; not both.

        Where the weight is packed, either is applied before the result is rounded to its type.
        """
        assert gelu is None or times_NO is None
        if x_NI.shape[0] == 0:
            return x_NI.new_empty(0, self.out_features)
        if self._row_counts:
            return self._padded(x_NI, gelu, times_NO)
        if x_NI.shape[0] == 1 and self.in_features > DEEPEST_SINGLE_ROW:
            return self.product(x_NI.repeat(2, 1), gelu, None if times_NO is None else times_NO.repeat(2, 1))[:1]
        return self.product(x_NI, gelu, times_NO)

    def _padded(self, x_NI: torch.Tensor, gelu: Gelu | None, times_NO: torch.Tensor | None) -> torch.Tensor:
        parts = []
        for begin in range(0, len(x_NI), self._row_counts[-1]):
            part = slice(begin, begin + self._row_counts[-1])
            num_rows = len(x_NI[part])
            x, times = x_NI[part], None if times_NO is None else times_NO[part]
            num_more = next(count for count in self._row_counts if count >= num_rows) - num_rows
            if num_more:
                x = functional.pad(x, (0, 0, 0, num_more))
                times = None if times is None else functional.pad(times, (0, 0, 0, num_more))
            y = self.product(x, gelu, times)
            parts.append(y[:num_rows] if num_more else y)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def product(self, x_NI: torch.Tensor, gelu: Gelu | None, times_NO: torch.Tensor | None) -> torch.Tensor:
        """`__call__` with exactly these rows."""
        if not self._is_packed:
            y_NO = functional.linear(x_NI, self._weight)
            if times_NO is not None:
                return y_NO.mul_(times_NO)
            return y_NO if gelu is None else functional.gelu(y_NO, approximate=_APPROXIMATE[gelu])
        ops = torch.ops.mkldnn
        if times_NO is not None:
            return ops._linear_pointwise.binary(x_NI, times_NO, self._weight, None, "mul")  # type: ignore[no-any-return]
        name, form = ("none", "") if gelu is None else ("gelu", _APPROXIMATE[gelu])
        return ops._linear_pointwise(x_NI, self._weight, None, name, [], form)  # type: ignore[no-any-return]


_APPROXIMATE = {Gelu.ERF: "none", Gelu.TANH: "tanh"}

_agreeing: dict[tuple[torch.dtype, bool, int, int, int], tuple[int, ...]] = {}
"""By type, whether packed, outputs, inputs and threads."""


@torch.inference_mode()
def _find_agreeing(linear: PackedLinear) -> tuple[int, ...]:
    """Those of ROW_COUNTS that give every row the bits that FIXED_ROWS gives it, wherever in a batch it is."""
    random = torch.Generator().manual_seed(0)
    most = max(ROW_COUNTS)
    x_NI = torch.randn(most, linear.in_features, generator=random).to(linear.device, linear.dtype)
    times_NO = torch.randn(most, linear.out_features, generator=random).to(linear.device, linear.dtype)

    def compute(begin: int, count: int, gelu: Gelu | None, has_times: bool) -> torch.Tensor:
        rows = slice(begin, begin + count)
        return linear.product(x_NI[rows], gelu, times_NO[rows] if has_times else None)

    agreeing = set(ROW_COUNTS)
    if linear.in_features > DEEPEST_SINGLE_ROW:
        agreeing.discard(1)  # in bfloat16 rounding hides most of the difference, so few rows may not show it
    for form in ((None, False), (Gelu.ERF, False), (None, True)):
        expected = torch.cat([compute(begin, FIXED_ROWS, *form) for begin in range(0, most, FIXED_ROWS)])
        for count in sorted(agreeing):
            for begin in range(0, most - count + 1, max(count, most // FIXED_ROWS - 1)):
                if not torch.equal(compute(begin, count, *form), expected[begin : begin + count]):
                    agreeing.discard(count)
    return tuple(sorted(agreeing | {FIXED_ROWS}))
