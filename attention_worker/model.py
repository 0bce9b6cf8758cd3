"""Grok-1's forward pass with one hole: everything but the experts, in the order of the equations.

The hole is the MoE. Whoever drives the generator receives each layer's MoE input and sends back its output; how and
where that is computed is not known here. A stage of a pipeline computes some of the layers: it begins with the residual
that the layers before have left, and ends with the one it leaves. A rank has its heads and its rows of the vocabulary;
what of it must become a whole is asked of a `Sharding`. Equations: docs/numerics.md.

Letters: T tokens of the step, D hidden, H query heads, K KV heads, d head size, R rows whose logits are wanted,
V vocabulary; H and K are this rank's.
"""

from __future__ import annotations

from collections.abc import Generator

import torch

from attention_worker.device_kernels import select_kernels
from attention_worker.kv_cache import KVCache
from attention_worker.layers import Rope, Rotation
from attention_worker.row_passes import scaled, times
from attention_worker.sharding import WHOLE, Sharding
from attention_worker.stages import StageClock
from attention_worker.step_batch import StepBatch
from attention_worker.weights import AttentionWeights, LayerWeights
from grokmoe.model_config import ModelConfig

Forward = Generator[torch.Tensor, torch.Tensor, torch.Tensor]
"""Yields every layer's MoE input [T, D], receives its output [T, D], both on the host. Returns float32 logits [R, V] on
the model's device; without the last layer the residual [T, D], float32, on the host."""

_HOLE = torch.device("cpu")
"""Where the two are, and the residual between two stages: gating, dispatch and the wire are there."""


class Model:
    """The weights of one attention worker and the loop over its layers. Says of each stage to `clock` when it ends."""

    def __init__(
        self, config: ModelConfig, weights: AttentionWeights, cache: KVCache, sharding: Sharding = WHOLE
    ) -> None:
        """cache: of this rank's KV heads. sharding: how its parts become a whole."""
        self.clock = StageClock()
        self._sharding, self._head_groups = sharding, weights.shard.groups
        self._device = device = weights.device
        self._config, self._weights, self._cache = config, weights, cache
        self._rope = Rope(config.head_dim, config.context_length, config.rope_base, device)
        self._kernels = select_kernels(device, weights.deterministic)

    @property
    def can_be_recorded(self) -> bool:
        """Whether the forward of decodes is loops alone (`grokmoe.recording`), from tokens to logits."""
        weights = self._weights
        products = [product for layer in weights.layers for product in (layer.qkv, layer.o_proj)]
        if weights.embedding_VD is None or weights.head is None:
            return False
        is_here = self._device.type == "cpu" and weights.shard.size == 1  # what other ranks send is no loop
        return is_here and all(product.is_loops for product in (*products, weights.head))

    def forward(self, batch: StepBatch, logit_rows_R: torch.Tensor, hidden_TD: torch.Tensor | None = None) -> Forward:
        """One step. logit_rows_R: rows of the step whose logits are wanted; there may be none.

        hidden_TD: the residual after the layers before, float32, where these are another worker's; not written to.
        """
        batch.check_pages(self._cache.num_pages)
        batch = batch.to(self._device)
        h_TD = self._embed(batch) if hidden_TD is None else hidden_TD.to(self._device, copy=True)
        rotation = self._rope.angles(batch.positions_T)
        self.clock.lap("embed")
        for index, layer in enumerate(self._weights.layers):
            y_TD = self._attend(index, layer, self._norm(h_TD, layer.pre_attn_norm_D), rotation, batch)
            x_TD = self._add_then_norm(h_TD, y_TD, layer.post_attn_norm_D, layer.pre_moe_norm_D)
            moe_TD = yield x_TD.to(_HOLE)
            self._add(h_TD, moe_TD.to(self._device), layer.post_moe_norm_D)
        if self._weights.head is None:
            return h_TD.to(_HOLE)
        if len(logit_rows_R) < len(h_TD):  # else they are all of them
            h_TD = h_TD.index_select(0, logit_rows_R.to(self._device))
        return self._logits(h_TD)

    def _norm(self, h_TD: torch.Tensor, gain_D: torch.Tensor) -> torch.Tensor:
        """From the residual to the input of a block, in the model's type."""
        x_TD = self._kernels.norm(h_TD, gain_D, self._config.norm_eps, self._weights.dtype)
        self.clock.lap("norm")
        return x_TD

    def _add(self, h_TD: torch.Tensor, y_TD: torch.Tensor, gain_D: torch.Tensor) -> None:
        """The output of a block, normed, onto the residual."""
        self._kernels.add_normed(h_TD, y_TD, gain_D, self._config.norm_eps)
        self.clock.lap("norm")

    def _add_then_norm(
        self, h_TD: torch.Tensor, y_TD: torch.Tensor, y_gain_D: torch.Tensor, h_gain_D: torch.Tensor
    ) -> torch.Tensor:
        """`_add`, then `_norm` of the sum."""
        dtype = self._weights.dtype
        x_TD = self._kernels.add_normed_then_norm(h_TD, y_TD, y_gain_D, h_gain_D, self._config.norm_eps, dtype)
        self.clock.lap("norm")
        return x_TD

    def _embed(self, batch: StepBatch) -> torch.Tensor:
        """The residual stream starts here, with the rows that callers have sent in place of those of the table.

        It is float32 in every mode, from one stage to the next as well: rounding it to bfloat16 at each of its 2 L
        additions would be the largest error of all (docs/log.md).
        """
        embedding_VD = self._weights.embedding_VD
        assert embedding_VD is not None, "checked: only a plan for the first layer comes without a hidden state"
        h_TD = self._sharding.embed(embedding_VD, batch.token_ids_T, self._config.embedding_multiplier)
        for first, rows_RD in batch.embeds:
            h_TD[first : first + len(rows_RD)] = rows_RD.to(self._device)
        return h_TD

    def _attend(
        self, index: int, layer: LayerWeights, x_TD: torch.Tensor, rotation: Rotation, batch: StepBatch
    ) -> torch.Tensor:
        """Attention block: projections, rotary embedding, pages, output projection."""
        config, k_KPSd, v_KPSd = self._config, self._cache.k_KPSd[index], self._cache.v_KPSd[index]
        qkv_TQ = layer.qkv(x_TD)
        self.clock.lap("qkv")
        q_THd = self._kernels.rotate_and_store(qkv_TQ, rotation, k_KPSd, v_KPSd, batch)
        out_THd = self._over_pages(q_THd, k_KPSd, v_KPSd, batch)
        self.clock.lap("attention")
        out_TD = self._sharding.sum(layer.o_proj(out_THd.flatten(1)), self._weights.dtype)
        if config.attention_output_scale != 1.0:
            out_TD = times(out_TD, config.attention_output_scale)
        self.clock.lap("out")
        return out_TD

    def _over_pages(
        self, q_THd: torch.Tensor, k_KPSd: torch.Tensor, v_KPSd: torch.Tensor, batch: StepBatch
    ) -> torch.Tensor:
        """Attention of the query heads, [T, H, d]: one call of the kernel, but where heads are shared out unevenly."""
        scale, cap = self._config.attention_logit_scale, self._config.attention_cap
        parts = []
        for group in self._head_groups:
            q_part = _heads(q_THd, 1, group.query_heads).contiguous()
            k_part, v_part = (_heads(pages, 0, group.kv_heads) for pages in (k_KPSd, v_KPSd))
            parts.append(self._kernels.attend(q_part, k_part, v_part, batch, scale, cap))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _logits(self, h_RD: torch.Tensor) -> torch.Tensor:
        final_norm_D, head = self._weights.final_norm_D, self._weights.head
        assert final_norm_D is not None
        assert head is not None
        part_RV = head(self._norm(h_RD, final_norm_D))
        logits_RV = scaled(self._sharding.join(part_RV), self._config.output_multiplier)
        self.clock.lap("head")
        return logits_RV


def _heads(x: torch.Tensor, dim: int, heads: range) -> torch.Tensor:
    return x.narrow(dim, heads.start, len(heads))
