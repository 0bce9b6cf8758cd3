"""The paged KV cache of an attention worker. Which page belongs to which sequence is the router's business.

Shapes: K KV heads, P pages, S slots of a page, d head size.
"""

from __future__ import annotations

import torch


class KVCache:
    """Keys and values of every layer, in pages of `page_size` slots.

    k_KPSd, v_KPSd: one tensor [num_kv_heads, num_pages, page_size, head_dim] per layer. With heads outermost a
    page of one head is one run of memory, and a sequence's pages in order are the [keys, d] matrix of a product.
    """

    def __init__(
        self,
        num_layers: int,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        """Allocates all pages at once, zeroed. ValueError if a size is not positive."""
        shape = (num_kv_heads, num_pages, page_size, head_dim)
        if num_layers < 1 or min(shape) < 1:
            raise ValueError(f"KV cache of {num_layers} layers of {shape}: sizes must be positive")
        self.page_size = page_size
        self.num_pages = num_pages
        self.k_KPSd = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.v_KPSd = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]

    @property
    def bytes(self) -> int:
        """Memory of all layers' pages, in bytes."""
        return sum(pages.nbytes for pages in (*self.k_KPSd, *self.v_KPSd))
