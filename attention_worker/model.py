"""Grok-1's forward pass with one hole: everything but the experts, in the order of the equations.

The hole is the MoE. Whoever drives the generator receives each layer's MoE input and sends back its output; how and
where that is computed is not known here. Equations: docs/numerics.md.

Letters: T tokens of the step, D hidden, H query heads, K KV heads, d head size, R rows whose logits are wanted,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator

import torch

from attention_worker.device_kernels import select_kernels
from attention_worker.kv_cache import KVCache
from attention_worker.layers import Rope, Rotation
from attention_worker.row_passes import scaled
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
        self._kernels = select_kernels(device, weights.deterministic)

    def forward(self, batch: StepBatch, logit_rows_R: torch.Tensor) -> Forward:
        """One step. logit_rows_R: rows of the step whose logits are wanted; there may be none."""
        batch.check_pages(self._cache.num_pages)
        h_TD = self._embed(batch.token_ids_T)
        rotation = self._rope.angles(batch.positions_T)
        for index, layer in enumerate(self._weights.layers):
            self._add(
                h_TD,
                self._attend(index, layer, self._norm(h_TD, layer.pre_attn_norm_D), rotation, batch),
                layer.post_attn_norm_D,
            )
            moe_TD = yield self._norm(h_TD, layer.pre_moe_norm_D)
            self._add(h_TD, moe_TD, layer.post_moe_norm_D)
        return self._logits(h_TD[logit_rows_R])

    def _norm(self, h_TD: torch.Tensor, gain_D: torch.Tensor) -> torch.Tensor:
        """From the residual to the input of a block, in the model's type."""
        return self._kernels.norm(h_TD, gain_D, self._config.norm_eps, self._weights.embedding_VD.dtype)

    def _add(self, h_TD: torch.Tensor, y_TD: torch.Tensor, gain_D: torch.Tensor) -> None:
        """The output of a block, normed, onto the residual."""
        self._kernels.add_normed(h_TD, y_TD, gain_D, self._config.norm_eps)

    def _embed(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        """The residual stream starts here. It is float32 in every mode: it is never sent anywhere, and rounding it to
        bfloat16 at each of its 2 L additions would be the largest error of all (docs/log.md)."""
        return self._weights.embedding_VD[token_ids_T].float() * self._config.embedding_multiplier

    def _attend(
        self, index: int, layer: LayerWeights, x_TD: torch.Tensor, rotation: Rotation, batch: StepBatch
    ) -> torch.Tensor:
        """Attention block: projections, rotary embedding, pages, output projection."""
        config, k_KPSd, v_KPSd = self._config, self._cache.k_KPSd[index], self._cache.v_KPSd[index]
        q_THd = self._kernels.rotate_and_store(layer.qkv(x_TD), rotation, k_KPSd, v_KPSd, batch)
        out_THd = self._kernels.attend(q_THd, k_KPSd, v_KPSd, batch, config.attention_logit_scale, config.attention_cap)
        out_TD = layer.o_proj(out_THd.view(len(x_TD), config.query_size))
        return out_TD if config.attention_output_scale == 1.0 else out_TD * config.attention_output_scale

    def _logits(self, h_RD: torch.Tensor) -> torch.Tensor:
        x_RD = self._norm(h_RD, self._weights.final_norm_D)
        return scaled(self._weights.head(x_RD), self._config.output_multiplier)
