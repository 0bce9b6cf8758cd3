"""Grok-1's forward pass with one hole: everything but the experts, in the order of the equations.

The hole is the MoE. Whoever drives the generator receives each layer's MoE input and sends back its output; how and
where that is computed is not known here. Equations: docs/numerics.md.

Letters: T tokens of the step, D hidden, H query heads, K KV heads, d head size, R rows whose logits are wanted,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator

import torch

from attention_worker.attention import select_attention
from attention_worker.kv_cache import KVCache
from attention_worker.layers import Rope, rms_norm
from attention_worker.step_batch import StepBatch
from attention_worker.weights import AttentionWeights, LayerWeights
from grokmoe.model_config import ModelConfig

Forward = Generator[torch.Tensor, torch.Tensor, torch.Tensor]
"""Yields every layer's MoE input [T, D], receives its output [T, D], returns float32 logits [R, V]."""


class Model:
    """The weights of one attention worker and the loop over its layers."""

    def __init__(self, config: ModelConfig, weights: AttentionWeights, cache: KVCache) -> None:
        device = weights.embedding_VD.device
        self._config, self._weights, self._cache = config, weights, cache
        self._rope = Rope(config.head_dim, config.context_length, config.rope_base, device)
        self._attend_pages = select_attention(device, weights.deterministic)

    def forward(self, batch: StepBatch, logit_rows_R: torch.Tensor) -> Forward:
        """One step. logit_rows_R: rows of the step whose logits are wanted; there may be none."""
        h_TD = self._embed(batch.token_ids_T)
        rotation = self._rope.angles(batch.positions_T)
        for index, layer in enumerate(self._weights.layers):
            h_TD = h_TD + self._attend(index, layer, h_TD, rotation, batch)
            moe_TD = yield self._norm_in(h_TD, layer.pre_moe_norm_D)
            h_TD = h_TD + self._norm_out(moe_TD, layer.post_moe_norm_D)
        return self._logits(h_TD[logit_rows_R])

    def _norm_in(self, h_TD: torch.Tensor, gain_D: torch.Tensor) -> torch.Tensor:
        """From the residual to the input of a block, in the model's type."""
        return rms_norm(h_TD, gain_D, self._config.norm_eps, self._weights.embedding_VD.dtype)

    def _norm_out(self, x_TD: torch.Tensor, gain_D: torch.Tensor) -> torch.Tensor:
        """From the output of a block to what is added to the residual, in float32."""
        return rms_norm(x_TD, gain_D, self._config.norm_eps, torch.float32)

    def _embed(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        """The residual stream starts here. It is float32 in every mode: it is never sent anywhere, and rounding it to
        bfloat16 at each of its 2 L additions would be the largest error of all (docs/log.md)."""
        return self._weights.embedding_VD[token_ids_T].float() * self._config.embedding_multiplier

    def _attend(
        self, index: int, layer: LayerWeights, h_TD: torch.Tensor, rotation: object, batch: StepBatch
    ) -> torch.Tensor:
        """Attention block: norm, projections, rotary embedding, pages, output projection, norm."""
        config, num_tokens = self._config, h_TD.shape[0]
        qkv = layer.qkv(self._norm_in(h_TD, layer.pre_attn_norm_D))
        q, k, v = qkv.split((config.query_size, config.kv_size, config.kv_size), dim=-1)
        q_THd = self._rope.rotate(q.view(num_tokens, config.num_heads, config.head_dim), rotation)
        k_TKd = self._rope.rotate(k.view(num_tokens, config.num_kv_heads, config.head_dim), rotation)
        v_TKd = v.view(num_tokens, config.num_kv_heads, config.head_dim)
        self._cache.write(index, k_TKd, v_TKd, batch.slots_T)
        out_THd = self._attend_pages(
            q_THd,
            self._cache.k_KPSd[index],
            self._cache.v_KPSd[index],
            batch,
            config.attention_logit_scale,
            config.attention_cap,
        )
        out_TD = layer.o_proj(out_THd.reshape(num_tokens, config.query_size))
        if config.attention_output_scale != 1.0:
            out_TD = out_TD * config.attention_output_scale
        return self._norm_out(out_TD, layer.post_attn_norm_D)

    def _logits(self, h_RD: torch.Tensor) -> torch.Tensor:
        x_RD = self._norm_in(h_RD, self._weights.final_norm_D)
        return self._weights.head(x_RD).float() * self._config.output_multiplier
