"""y = x W^T with the weight laid out once for the device, instead of at every call.

On CPU oneDNN's blocked layout makes small batches two to three times as fast as a plain linear (docs/log.md). Its
entry points are private to torch, so they are tried once and a plain linear takes over where they fail.

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

    __slots__ = ("_is_packed", "_weight", "dtype", "in_features", "out_features")

    def __init__(self, weight_OI: torch.Tensor) -> None:
        """weight_OI: as in the checkpoint, in the type to compute in."""
        self.out_features, self.in_features = weight_OI.shape
        self.dtype = weight_OI.dtype
        self._is_packed = weight_OI.device.type == "cpu" and can_pack(self.dtype)
        if self._is_packed:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous(), PACK_ROWS)
        else:
            self._weight = weight_OI.contiguous()

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
