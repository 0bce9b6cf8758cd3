"""A yardstick: the model's forward in straight torch, with packed weights and nothing around it.

No service, no pages, no scheduler, contiguous caches that are long enough from the start, every sequence at the same
position. What a server adds to this is what it costs. Beside the time of whole steps it tells the time of the products
and the attention in them: what remains if gate, norms, rotation and the combination of experts cost nothing.

Shapes: T rows, H hidden, B sequences, N query heads, K KV heads (of what the gate says: experts of a row), D head, S
positions, E experts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.nn import functional

from grokmoe import tensor_names as names
from grokmoe.checkpoint import Checkpoint
from grokmoe.model_config import Gelu, ModelConfig

PACK_ROWS = 8
"""Row count that the weights are laid out for: the layout for few rows is also good for many."""

QUERY_BLOCK = 256
"""Queries of a prompt whose scores are in memory at once."""

DTYPE = torch.bfloat16

Product = Callable[[torch.Tensor], torch.Tensor]

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Layer, queries, keys and values of the new rows -> mixed values of each row, all heads together."""


def product(weight: torch.Tensor, gelu: Gelu | None = None) -> Product:
    """x @ weight.T, by oneDNN from a packed copy, with the GELU of that form after it."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(DTYPE), PACK_ROWS)
    after, form = ("none", "") if gelu is None else ("gelu", "tanh" if gelu is Gelu.TANH else "none")
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, after, [], form)


Caches = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of each layer, [B, K, S, D]."""


class Layer:
    """The weights of one layer."""

    def __init__(self, checkpoint: Checkpoint, layer: int) -> None:
        def read(name: str) -> torch.Tensor:
            return checkpoint.read(name, torch.float32)

        def attention(projection: names.Projection) -> torch.Tensor:
            return read(names.attention(layer, projection))

        self.norms = [read(names.norm(layer, kind)) for kind in names.NORMS]
        self.qkv = product(torch.cat([attention("q_proj"), attention("k_proj"), attention("v_proj")]))
        self.out = product(attention("o_proj") * checkpoint.config.attention_output_scale)
        self.gate_EH = read(names.gate(layer))
        self.experts = [
            (
                product(read(names.expert(layer, expert, "linear")), checkpoint.config.gelu),
                product(read(names.expert(layer, expert, "linear_v"))),
                product(read(names.expert(layer, expert, "linear_1"))),
            )
            for expert in range(checkpoint.config.num_experts)
        ]


class StraightTorch:
    """The model. parts: seconds spent in products and attention since it was last set to 0."""

    def __init__(self, directory: Path) -> None:
        with Checkpoint.open(directory) as checkpoint:
            self.config: ModelConfig = checkpoint.config
            self._embed = checkpoint.read(names.embed(), DTYPE)
            self._layers = [Layer(checkpoint, layer) for layer in range(self.config.num_layers)]
            self._final_norm = checkpoint.read(names.final_norm(), torch.float32)
            self._head = product(checkpoint.read(names.head(self.config), DTYPE))
        half = torch.arange(0, self.config.head_dim, 2) / self.config.head_dim
        self._frequencies = self.config.rope_base**-half
        self.parts = 0.0

    @contextmanager
    def _part(self) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.parts += time.perf_counter() - begin

    def caches(self, batch: int, length: int) -> Caches:
        """Of a past that never was, `length` positions long."""
        shape = (batch, self.config.num_kv_heads, length, self.config.head_dim)
        return [(torch.randn(shape).to(DTYPE), torch.randn(shape).to(DTYPE)) for _ in self._layers]

    def prefill(self, ids_T: torch.Tensor) -> torch.Tensor:
        """The token after one prompt. Its keys and values are not kept."""
        h = self._layers_of(ids_T, torch.arange(len(ids_T)), lambda layer, q, k, v: self._attend_prompt(q, k, v))
        return self._choose(h[-1:])

    def decode(self, ids_B: torch.Tensor, position: int, caches: Caches) -> torch.Tensor:
        """The next token of each sequence, all of which are at this position."""

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            keys, values = caches[layer]
            keys[:, :, position], values[:, :, position] = k, v
            return self._attend(q, keys[:, :, : position + 1], values[:, :, : position + 1])

        return self._choose(self._layers_of(ids_B, torch.full(ids_B.shape, position), attend))

    def _layers_of(self, ids: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        c = self.config
        h = self._embed[ids] * c.embedding_multiplier
        for index, layer in enumerate(self._layers):
            x = self._norm(h, layer.norms[0])
            with self._part():
                qkv = layer.qkv(x)
            q, k, v = qkv.split([c.query_size, c.kv_size, c.kv_size], -1)
            q = self._rotate(q.view(-1, c.num_heads, c.head_dim), positions)
            k = self._rotate(k.view(-1, c.num_kv_heads, c.head_dim), positions)
            with self._part():
                out = layer.out(attend(index, q, k, v.view(-1, c.num_kv_heads, c.head_dim)))
            h = h + self._norm(out, layer.norms[1])
            h = h + self._norm(self._experts(layer, self._norm(h, layer.norms[2])), layer.norms[3])
        return h

    def _choose(self, h: torch.Tensor) -> torch.Tensor:
        x = self._norm(h, self._final_norm)
        with self._part():
            logits = self._head(x)
        return logits.argmax(-1)

    def _norm(self, x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x.float(), gain.shape, gain, self.config.norm_eps).to(DTYPE)

    def _rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        angles = positions[:, None, None] * self._frequencies
        cos, sin = angles.cos().to(DTYPE), angles.sin().to(DTYPE)
        left, right = x.chunk(2, -1)
        return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)

    def _cap(self, scores: torch.Tensor) -> torch.Tensor:
        c = self.config
        return scores.mul_(c.attention_logit_scale / c.attention_cap).tanh_().mul_(c.attention_cap)

    def _attend(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """One query per sequence. q [B, N, D], keys and values [B, K, S, D]."""
        grouped = q.view(len(q), self.config.num_kv_heads, -1, self.config.head_dim)
        scores = self._cap(torch.matmul(grouped, keys.transpose(-1, -2)).float())
        return torch.matmul(scores.softmax(-1).to(DTYPE), values).reshape(len(q), -1)

    def _attend_prompt(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Causal attention of a prompt to itself, block by block of its queries. All [T, heads, D]."""
        num_kv, head_dim = self.config.num_kv_heads, self.config.head_dim
        k, v, out = k.transpose(0, 1), v.transpose(0, 1), []
        for begin in range(0, len(q), QUERY_BLOCK):
            block = q[begin : begin + QUERY_BLOCK]
            end, rows = begin + len(block), len(block)
            grouped = block.view(rows, num_kv, -1, head_dim).permute(1, 2, 0, 3).reshape(num_kv, -1, head_dim)
            scores = self._cap(torch.matmul(grouped, k[:, :end].transpose(-1, -2))).view(num_kv, -1, rows, end)
            scores.masked_fill_(torch.ones(rows, end, dtype=torch.bool).triu_(begin + 1), -torch.inf)
            mixed = torch.matmul(scores.softmax(-1).view(num_kv, -1, end), v[:, :end])
            out.append(mixed.view(num_kv, -1, rows, head_dim).permute(2, 0, 1, 3).reshape(rows, -1))
        return torch.cat(out)

    def _experts(self, layer: Layer, x_TH: torch.Tensor) -> torch.Tensor:
        c = self.config
        logits = x_TH.float() @ layer.gate_EH.T
        if c.router_cap is not None:
            logits = c.router_cap * torch.tanh(logits / c.router_cap)
        weights_TK, ids_TK = logits.softmax(-1).topk(c.experts_per_token)
        if c.renormalize_gates:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        order = ids_TK.flatten().argsort(stable=True)
        counts = torch.bincount(ids_TK.flatten(), minlength=c.num_experts).tolist()
        rows = x_TH[order // c.experts_per_token].split(counts)
        with self._part():
            outs = []
            for (gate, up, down), mine in zip(layer.experts, rows, strict=True):
                if len(mine):
                    outs.append(down(gate(mine).mul_(up(mine))))
            sorted_out = torch.cat(outs)
        back = torch.empty_like(sorted_out)
        back[order] = sorted_out
        return (back.view(*weights_TK.shape, -1) * weights_TK[..., None]).sum(1).to(DTYPE)
