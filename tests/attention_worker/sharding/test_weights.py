"""What a rank reads and keeps of a checkpoint: its part, and nothing of the others'."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from attention_worker import weights as weights_module
from attention_worker.sharding import Shard
from attention_worker.weights import load_weights
from grokmoe import tensor_names as names
from grokmoe.checkpoint import Checkpoint
from grokmoe.checkpoint_writer import random_checkpoint
from grokmoe.linear import Linear
from grokmoe.model_config import TINY, ModelConfig

CONFIG = dataclasses.replace(TINY, num_heads=8, num_kv_heads=2, vocab_size=300, tie_word_embeddings=False)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    random_checkpoint(folder, CONFIG, seed=1)
    return folder


def matrix(linear: Linear) -> torch.Tensor:
    """The weight, [out, in], looked at through the products that it makes."""
    return linear(torch.eye(linear.in_features)).T  # type: ignore[attr-defined]


@pytest.mark.parametrize("size", [2, 4, 8])
def test_parts_side_by_side_are_the_whole(model: Path, size: int) -> None:
    with Checkpoint.open(model) as checkpoint:
        whole = load_weights(checkpoint, torch.float32, CPU)
        shards = [Shard.of(CONFIG, rank, size) for rank in range(size)]
        parts = [load_weights(checkpoint, torch.float32, CPU, shard=shard) for shard in shards]
    d, H = CONFIG.head_dim, CONFIG.query_size
    for name in ("embedding_VD",):
        table = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(table[:300], getattr(whole, name))
        assert not table[300:].any()
    assert whole.head is not None
    heads = torch.cat([matrix(part.head) for part in parts])  # type: ignore[arg-type]
    torch.testing.assert_close(heads[:300], matrix(whole.head), rtol=0, atol=1e-6)
    for layer, own in enumerate(whole.layers):
        qkv, o_proj = matrix(own.qkv), matrix(own.o_proj)
        for shard, part in zip(shards, parts, strict=True):
            q, kv = shard.query_heads, shard.kv_heads
            rows = [*range(q.start * d, q.stop * d)]
            for first in (H, H + CONFIG.kv_size):
                rows += range(first + kv.start * d, first + kv.stop * d)
            torch.testing.assert_close(matrix(part.layers[layer].qkv), qkv[rows], rtol=0, atol=1e-6)
            columns = o_proj[:, q.start * d : q.stop * d]
            torch.testing.assert_close(matrix(part.layers[layer].o_proj), columns, rtol=0, atol=1e-6)
            assert torch.equal(part.layers[layer].post_moe_norm_D, own.post_moe_norm_D)


@pytest.mark.parametrize("config", [CONFIG, dataclasses.replace(CONFIG, tie_word_embeddings=True)])
def test_a_rank_never_holds_more_than_its_part(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: ModelConfig
) -> None:
    """Of each tensor it asks for its rows alone; of the output projection, which is cut the other way, for slices."""
    random_checkpoint(tmp_path, config, seed=1)
    monkeypatch.setattr(weights_module, "SLICE_BYTES", 1000)
    asked: dict[str, list[int]] = {}
    read = Checkpoint.read

    def counting(
        self: Checkpoint, name: str, dtype: torch.dtype | None = None, rows: slice | None = None
    ) -> torch.Tensor:
        found = read(self, name, dtype, rows)
        asked.setdefault(name, []).append(found.numel())
        return found

    monkeypatch.setattr(Checkpoint, "read", counting)
    with Checkpoint.open(tmp_path) as checkpoint:
        load_weights(checkpoint, torch.float32, CPU, shard=Shard.of(config, 1, 4))
    d, D = config.head_dim, config.hidden_size
    assert asked[names.attention(0, "q_proj")] == [config.query_size * D // 4]
    assert asked[names.attention(0, "k_proj")] == asked[names.attention(0, "v_proj")] == [d * D]
    assert max(asked[names.attention(0, "o_proj")]) * 4 <= 1000
    assert asked[names.embed()] == [128 * D]
    assert asked.get(names.head(config)) == [128 * D]
    assert not any(names.expert_of(name) is not None for name in asked)
