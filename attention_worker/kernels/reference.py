"""Paged attention, corrections of low rank and gating in plain torch: the definitions that the kernels are tested
against.

Shapes: T tokens of the step, H query heads, K KV heads, P pages, S slots of a page, d head size, n tokens of a
chunk, L keys of a sequence; in `add_low_rank` I inputs, O outputs, N rows of a segment, R rank; in `gate` D hidden,
E experts, K experts per token.
"""

from __future__ import annotations

import torch

from attention_worker.kernels.low_rank import Projections, Segments
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


def add_low_rank(
    y_TO: torch.Tensor, x_TI: torch.Tensor, segments: Segments, layer: int, projections: Projections
) -> None:
    """y += scale * B A x, in place, for the rows that have an adapter; float32 inside, rounded once, to y's type.

    projections: those whose product y is. A row's result depends on the row and its adapter alone.
    """
    rows = torch.from_numpy(segments.rows_N).to(y_TO.device).split(list(segments.counts_S))
    for rows_N, layers in zip(rows, segments.parts, strict=True):
        x_NI = x_TI.index_select(0, rows_N).float()
        for part in layers[layer][slice(*projections)]:
            if part is not None:
                delta_NO = (x_NI @ part.a_RI.float().T * part.scale) @ part.b_RO.float()
                outs = slice(part.first_out, part.first_out + delta_NO.shape[1])
                y_TO[rows_N, outs] = (y_TO[rows_N, outs].float() + delta_NO).to(y_TO.dtype)


def gate(
    x_TD: torch.Tensor, gate_ED: torch.Tensor, num_ranks: int, cap: float | None, renormalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """z = W x, optionally capped to cap * tanh(z / cap); p = softmax(z) over all experts; the K largest, optionally
    renormalised to sum to one (docs/numerics.md, "MoE").

    gate_ED: float32. Float32 inside. Returns: weights_TK float32 in descending order, expert_ids_TK int64; of equal
    probabilities the lower expert is first. A token that is no number gets the first K experts, with weights of NaN.
    """
    logits_TE = x_TD.float() @ gate_ED.T
    if cap is not None:
        logits_TE = cap * torch.tanh(logits_TE / cap)
    chance_TE = logits_TE.softmax(-1)
    is_faulty_T1 = chance_TE.isnan().any(-1, keepdim=True)
    order_TE = chance_TE.masked_fill(is_faulty_T1, 0.0).sort(dim=-1, descending=True, stable=True).indices
    expert_ids_TK = order_TE[:, :num_ranks]
    weights_TK = chance_TE.gather(1, expert_ids_TK)
    if renormalize:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    return weights_TK.masked_fill(is_faulty_T1, float("nan")), expert_ids_TK
