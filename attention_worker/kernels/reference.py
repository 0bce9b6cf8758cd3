"""Paged attention in plain torch, one sequence at a time: the definition that the kernels are tested against.

Shapes: T tokens of the step, H query heads, K KV heads, P pages, S slots of a page, d head size, n tokens of a
chunk, L keys of a sequence.
"""

from __future__ import annotations

import torch

from attention_worker.step_batch import StepBatch


def paged_attention(
    q_THd: torch.Tensor,
    k_KPSd: torch.Tensor,
    v_KPSd: torch.Tensor,
    batch: StepBatch,
    scale: float,
    cap: float,
) -> torch.Tensor:
    """softmax(mask(cap * tanh(scale * q.k / cap))) v for every row of the step; [T, H, d] in q's dtype.

    Float32 inside. A row at position p sees the keys of its own sequence at positions 0 .. p; the step's own keys
    are in the cache already. Query head h reads KV head h // (H / K).
    """
    num_heads, num_kv_heads = q_THd.shape[1], k_KPSd.shape[0]
    out_THd = torch.empty_like(q_THd)
    row = 0
    for chunk in batch.chunks:
        n = len(chunk.token_ids)
        num_keys = chunk.start + n
        pages = torch.tensor(chunk.page_ids, device=q_THd.device)
        k_KLd = k_KPSd[:, pages].flatten(1, 2)[:, :num_keys].float()
        v_KLd = v_KPSd[:, pages].flatten(1, 2)[:, :num_keys].float()
        k_HLd = k_KLd.repeat_interleave(num_heads // num_kv_heads, dim=0)
        v_HLd = v_KLd.repeat_interleave(num_heads // num_kv_heads, dim=0)
        q_Hnd = q_THd[row : row + n].float().transpose(0, 1)
        scores_HnL = cap * torch.tanh(scale * (q_Hnd @ k_HLd.transpose(1, 2)) / cap)
        key_L = torch.arange(num_keys, device=q_THd.device)
        position_n = torch.arange(chunk.start, num_keys, device=q_THd.device)
        scores_HnL = scores_HnL.masked_fill(key_L > position_n[:, None], float("-inf"))
        out_THd[row : row + n] = (scores_HnL.softmax(dim=-1) @ v_HLd).transpose(0, 1).to(q_THd.dtype)
        row += n
    return out_THd
