"""Paged attention in bfloat16 on the CPU, batched over tiles of query rows and KV heads (see `tiles`): for prompts.

torch's products round their result, which would move a score of 30 by up to 0.06 and its weight by 6 %. So the scores
take two products on the matrix units: the second accumulates q.k in float32 onto the negated first and so yields what
the first lost to rounding. Their sum is exact to 2^-17 of the score. Weights and results are rounded.

Shapes: N tiles, R rows of a tile, L keys of a tile, K KV heads, G query heads per KV head, B = N * K pairs,
Q = R * G query rows of a pair, T tokens of the step, H = K * G query heads, D = H * d, E = G * d, P pages,
S slots of a page, d head size.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch

from attention_worker.kernels.cpu_weights import exponents, weigh
from attention_worker.kernels.tiles import TileGroup, TileShape


class _Workspace(threading.local):
    """Buffers kept between calls, one set per thread: faulting in a fresh one costs more than its product."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def take(self, name: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """An uninitialised contiguous tensor; valid until the next `take` of the same name and dtype."""
        size = math.prod(shape)
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < size:
            with torch.inference_mode(False):  # a buffer made in that mode could never be used outside it
                buffer = self._buffers[name, dtype] = torch.empty(size, dtype=dtype)
        return buffer[:size].view(shape)


_workspace = _Workspace()


def attend(
    out_TD: torch.Tensor,
    q_THd: torch.Tensor,
    k_KPSd: torch.Tensor,
    v_KPSd: torch.Tensor,
    groups: Sequence[TileGroup],
    shape: TileShape,
    scale: float,
    cap: float,
) -> None:
    """`reference.paged_attention` for the rows of these tiles.

    out_TD: [T + 1, H * d], whose last row takes what padding rows come to.
    """
    q_TD = q_THd.flatten(1)
    k_pages = k_KPSd.view(shape.num_kv_heads * shape.num_pages, shape.page_size * shape.head_dim)
    v_pages = v_KPSd.view(shape.num_kv_heads * shape.num_pages, shape.page_size * shape.head_dim)
    for group in groups:
        q_BQd = _queries(q_TD, group, shape)
        weights_BQL, sum_BQ1 = _weights(q_BQd, k_pages, group, shape, scale, cap)
        _write(out_TD, _values(weights_BQL, v_pages, group, shape) / sum_BQ1, group, shape)


def _queries(q_TD: torch.Tensor, group: TileGroup, shape: TileShape) -> torch.Tensor:
    """The group's query rows [B, Q, d]: heads that share a KV head become rows, so no key is repeated."""
    N, R, K, d = group.num_tiles, group.num_rows, shape.num_kv_heads, shape.head_dim
    if group.first_row is not None:
        q_rows = q_TD[group.first_row : group.first_row + N * R]
    else:
        q_rows = q_TD.index_select(0, group.q_rows_NR)
    return q_rows.view(N, R, K, -1, d).transpose(1, 2).reshape(N * K, -1, d)


def _gather(pages: torch.Tensor, group: TileGroup, shape: TileShape) -> torch.Tensor:
    """The group's keys or values [B, L, d], in a buffer that the next gather reuses."""
    buffer = _workspace.take("gathered", pages.dtype, len(group.pages_NKJ), pages.shape[1])
    torch.index_select(pages, 0, group.pages_NKJ, out=buffer)
    return buffer.view(-1, group.num_keys, shape.head_dim)


def _weights(
    q_BQd: torch.Tensor, k_pages: torch.Tensor, group: TileGroup, shape: TileShape, scale: float, cap: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax weights [B, Q, L] in q's dtype before division by their sums [B, Q, 1], which are float32."""
    factor, depth = exponents(scale, cap)
    k_BdL = _gather(k_pages, group, shape).transpose(1, 2)
    size = (*q_BQd.shape[:2], group.num_keys)
    high_BQL = _workspace.take("high", q_BQd.dtype, *size)
    low_BQL = _workspace.take("low", q_BQd.dtype, *size)
    torch.baddbmm(high_BQL, q_BQd, k_BdL, beta=0, alpha=factor, out=high_BQL)
    torch.baddbmm(high_BQL, q_BQd, k_BdL, beta=-1, alpha=factor, out=low_BQL)
    return high_BQL, weigh(high_BQL, low_BQL, group.num_seen_NKR, depth)


def _values(weights_BQL: torch.Tensor, v_pages: torch.Tensor, group: TileGroup, shape: TileShape) -> torch.Tensor:
    """Weighted sums of the values, [B, Q, d]."""
    v_BLd = _gather(v_pages, group, shape)
    if group.unused_slots is not None:
        # A hidden key has weight zero, but zero times what an unwritten slot holds may be NaN.
        v_BLd.view(-1, shape.head_dim).index_fill_(0, group.unused_slots, 0)
    return torch.bmm(weights_BQL, v_BLd)


def _write(out_TD: torch.Tensor, o_BQd: torch.Tensor, group: TileGroup, shape: TileShape) -> None:
    N, R, K = group.num_tiles, group.num_rows, shape.num_kv_heads
    o_NRKE = o_BQd.view(N, K, R, -1).transpose(1, 2)
    if group.first_row is not None:
        out_TD[group.first_row : group.first_row + N * R].view(N, R, K, -1).copy_(o_NRKE)
    else:
        out_TD.index_copy_(0, group.out_rows_NR, o_NRKE.reshape(N * R, -1).to(out_TD.dtype))
