"""y = x W^T as one part of a sum that is taken elsewhere: in float32, so that what is added up has not been rounded.

Letters: N rows, I inputs, O outputs.
"""

from __future__ import annotations

import torch

from grokmoe.model_config import Gelu
from grokmoe.packed_linear import PackedLinear


class PartLinear(PackedLinear):
    """A PackedLinear whose y is float32. oneDNN gives bfloat16 products in bfloat16 alone: there each part is rounded
    once; `panels` and GPUs round none."""

    __slots__ = ()

    @torch.inference_mode()
    def __call__(
        self, x_NI: torch.Tensor, gelu: Gelu | None = None, times_NO: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See PackedLinear."""
        return super().__call__(x_NI, gelu, times_NO).float()

    def product(self, x_NI: torch.Tensor, gelu: Gelu | None, times_NO: torch.Tensor | None) -> torch.Tensor:
        """See PackedLinear."""
        is_plain = gelu is None and times_NO is None
        if is_plain and self.device.type == "cuda" and self.dtype is not torch.float32:
            return torch.mm(x_NI, self._weight.T, out_dtype=torch.float32)
        return super().product(x_NI, gelu, times_NO)
