"""Paged attention on the CPU, batched over tiles of query rows and KV heads (see `tiles`).

The weights of a row are computed without a running maximum and with few, cheap passes over the scores:

    cap * tanh(s / cap) = cap - 2 * cap * sigmoid(-2 * s / cap)

so exp2(-c * sigmoid(-2 * s / cap)) with c = 2 * cap * log2(e) is the softmax weight up to a factor that the
row's sum divides out. It lies in [2^-c, 1]: nothing overflows, and the largest weights are the most exact.
torch's sigmoid and exp2 together cost a third of its tanh.

In bfloat16 torch's products round their result, which would move a score of 30 by up to 0.06 and its weight by
6 %. So the scores take two products on the matrix units: the second accumulates q.k in float32 onto the negated
first and so yields what the first lost to rounding. Their sum is exact to 2^-17 of the score. Weights and
results are rounded.

A row's bits depend on its query and its keys alone: not on its tile, its group, the padding or the threads
(docs/numerics.md). Sums over keys are therefore cut at fixed positions, and element-wise passes end on whole vectors.

Shapes: N tiles, R rows of a tile, L keys of a tile, K KV heads, G query heads per KV head, B = N * K pairs,
Q = R * G query rows of a pair, T tokens of the step, H = K * G query heads, D = H * d, E = G * d, P pages,
S slots of a page, d head size.
"""

from __future__ import annotations

import math
import threading
from itertools import pairwise

import torch

from attention_worker.kernels.tiles import TileGroup, TileShape
from attention_worker.step_batch import StepBatch

LARGEST_PLAIN_EXPONENT = 100.0
"""Beyond this c, 2^-c comes near the smallest float32, and rows are first shifted by their maximum."""

VALUE_KEYS = {torch.float32: 192, torch.bfloat16: 1024}
"""Keys that one product with the values adds up in one piece, whatever their number. Longer sums are cut by the
libraries, and where depends on their length: keys of weight zero at the end would change the last bits."""

VECTOR = 64
"""Elements that element-wise passes take at a time, at most. What is left over at the end of a share takes other
code, and sigmoid and exp2 then differ in the last bit."""

SHARE = 32768
"""Elements that torch gives to a thread before it takes another one."""


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

    deterministic: whether a row's bits may not depend on its company in bfloat16 with more than 1024 keys, either.
    IndexError if a page id is outside the cache.
    """
    num_rows, num_heads, head_dim = q_THd.shape
    num_kv_heads, num_pages, page_size, _ = k_KPSd.shape
    shape = TileShape(num_heads, num_kv_heads, head_dim, num_pages, page_size, q_THd.element_size())
    q_TD = q_THd.reshape(num_rows, num_heads * head_dim)
    k_pages = k_KPSd.view(num_kv_heads * num_pages, page_size * head_dim)
    v_pages = v_KPSd.view(num_kv_heads * num_pages, page_size * head_dim)
    out_TD = torch.empty(num_rows + 1, num_heads * head_dim, dtype=q_THd.dtype)  # the last row takes padding
    for group in batch.tile_groups(shape):
        q_BQd = _queries(q_TD, group, shape)
        weights_BQL, sum_BQ1 = _weights(q_BQd, k_pages, group, shape, scale, cap)
        _write(out_TD, _values(weights_BQL, v_pages, group, shape, deterministic) / sum_BQ1, group, shape)
    return out_TD[:num_rows].view(num_rows, num_heads, head_dim)


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
    B, Q, _ = q_BQd.shape
    size = B * Q * group.num_keys
    p_flat = _workspace.take("scores", torch.float32, whole_vectors(size, torch.get_num_threads()))
    p_BQL = p_flat[:size].view(B, Q, group.num_keys)
    _scaled_scores(p_BQL, q_BQd, _gather(k_pages, group, shape), -2.0 * scale / cap)
    exponent = 2.0 * cap * math.log2(math.e)
    p_flat.sigmoid_().mul_(-exponent)
    if group.hidden_N1R1M is not None:
        p_NKRGL = p_BQL.view(group.num_tiles, shape.num_kv_heads, group.num_rows, -1, group.num_keys)
        p_NKRGL[..., -group.hidden_N1R1M.shape[-1] :].masked_fill_(group.hidden_N1R1M, -math.inf)
    if exponent > LARGEST_PLAIN_EXPONENT:
        p_BQL.sub_(p_BQL.amax(dim=-1, keepdim=True))
    p_flat.exp2_()
    if q_BQd.dtype != p_BQL.dtype:
        p_BQL = _workspace.take("weights", q_BQd.dtype, *p_BQL.shape).copy_(p_BQL)
    # The sum of the rounded weights: where one key has nearly all the weight, its rounding then cancels.
    return p_BQL, p_BQL.sum(dim=-1, keepdim=True, dtype=torch.float32)


def whole_vectors(size: int, num_threads: int) -> int:
    """The least size from `size` on that torch's threads share out in equal parts of whole vectors."""
    while True:
        parts = max(1, min(num_threads, -(-size // SHARE)))
        padded = -(-size // (parts * VECTOR)) * parts * VECTOR
        if padded == size:
            return size
        size = padded


def _scaled_scores(out_BQL: torch.Tensor, q_BQd: torch.Tensor, k_BLd: torch.Tensor, factor: float) -> None:
    """factor * q.k, float32, into `out_BQL`."""
    k_BdL = k_BLd.transpose(1, 2)
    if q_BQd.dtype == torch.float32:
        torch.baddbmm(out_BQL, q_BQd, k_BdL, beta=0, alpha=factor, out=out_BQL)
        return
    part_BQL = _workspace.take("weights", q_BQd.dtype, *out_BQL.shape)
    torch.baddbmm(part_BQL, q_BQd, k_BdL, beta=0, alpha=factor, out=part_BQL)
    out_BQL.copy_(part_BQL)
    out_BQL.add_(part_BQL.baddbmm_(q_BQd, k_BdL, beta=-1, alpha=factor))


def _values(
    weights_BQL: torch.Tensor, v_pages: torch.Tensor, group: TileGroup, shape: TileShape, deterministic: bool
) -> torch.Tensor:
    """Weighted sums of the values, [B, Q, d]: in the values' dtype, or float32 where they are added up in parts."""
    v_BLd = _gather(v_pages, group, shape)
    if group.unused_slots is not None:
        # A hidden key has weight zero, but zero times what an unwritten slot holds may be NaN.
        v_BLd.view(-1, shape.head_dim).index_fill_(0, group.unused_slots, 0)
    return _weighted_sum(weights_BQL, v_BLd, deterministic)


def _weighted_sum(weights_BQL: torch.Tensor, v_BLd: torch.Tensor, deterministic: bool) -> torch.Tensor:
    """The product of weights and values, so cut that weights of zero at the end leave its bits as they are."""
    num_keys, piece = v_BLd.shape[1], VALUE_KEYS[v_BLd.dtype]
    if v_BLd.dtype == torch.float32:
        # A whole number of pieces is added up piece by piece inside one product.
        cuts = [num_keys // piece * piece]
    else:
        cuts = list(range(piece, num_keys, piece)) if deterministic else []
    cuts = [cut for cut in cuts if 0 < cut < num_keys]
    if not cuts:
        return torch.bmm(weights_BQL, v_BLd)
    first, *_ = cuts
    out_BQd = torch.bmm(weights_BQL[..., :first], v_BLd[:, :first]).float()
    for begin, end in pairwise([*cuts, num_keys]):
        out_BQd += torch.bmm(weights_BQL[..., begin:end], v_BLd[:, begin:end])
    return out_BQd


def _write(out_TD: torch.Tensor, o_BQd: torch.Tensor, group: TileGroup, shape: TileShape) -> None:
    N, R, K = group.num_tiles, group.num_rows, shape.num_kv_heads
    o_NRKE = o_BQd.view(N, K, R, -1).transpose(1, 2)
    if group.first_row is not None:
        out_TD[group.first_row : group.first_row + N * R].view(N, R, K, -1).copy_(o_NRKE)
    else:
        out_TD.index_copy_(0, group.out_rows_NR, o_NRKE.reshape(N * R, -1).to(out_TD.dtype))
