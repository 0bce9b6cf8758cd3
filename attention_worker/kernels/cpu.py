"""Paged attention on the CPU: rows alone where there are few, tiles of a matrix product where there are many."""

from __future__ import annotations

import torch

from attention_worker.kernels import cpu_rows, cpu_tiles
from attention_worker.kernels.tiles import TileShape
from attention_worker.step_batch import StepBatch

MOST_ROWS_APART = 8
"""Tokens of a chunk up to which its rows are computed one by one. More of them make a matrix product worth its fixed
cost and its copy of the keys."""


def paged_attention(
    q_THd: torch.Tensor,
    k_KPSd: torch.Tensor,
    v_KPSd: torch.Tensor,
    batch: StepBatch,
    scale: float,
    cap: float,
    deterministic: bool = False,
) -> torch.Tensor:
    """The function of `reference.paged_attention`, for float32 or bfloat16. Returns [T, H, d] in q's dtype.

    deterministic: whether a row's bits may depend on its query and its keys alone. In float32 they always do: every
    row is computed by itself, as there a matrix product saves little (docs/log.md).
    IndexError if a page id is outside the cache.
    """
    num_rows, num_heads, head_dim = q_THd.shape
    num_kv_heads, num_pages, page_size, _ = k_KPSd.shape
    batch.check_pages(num_pages)
    q_THd = q_THd.contiguous()
    out_TD = torch.empty(num_rows + 1, num_heads * head_dim, dtype=q_THd.dtype)
    always_apart = deterministic or q_THd.dtype is torch.float32
    apart = batch.rows_apart(None if always_apart else MOST_ROWS_APART)
    if len(apart.rows_R):
        cpu_rows.attend(out_TD, q_THd, k_KPSd, v_KPSd, apart, scale, cap)
    if len(apart.rows_R) < num_rows:
        shape = TileShape(num_heads, num_kv_heads, head_dim, num_pages, page_size, q_THd.element_size())
        groups = batch.tile_groups(shape, MOST_ROWS_APART)
        cpu_tiles.attend(out_TD, q_THd, k_KPSd, v_KPSd, groups, shape, scale, cap)
    return out_TD[:num_rows].view(num_rows, num_heads, head_dim)
