"""Who holds what: every query head and every row once, with the KV heads that are read and no other."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attention_worker.sharding import HeadGroup, Shard, most_kv_heads
from grokmoe.errors import ConfigError
from grokmoe.model_config import GROK1, TINY, ModelConfig
from tests import goldens


@st.composite
def models_and_sizes(draw: st.DrawFn) -> tuple[ModelConfig, int]:
    num_kv_heads, group = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    heads = num_kv_heads * group
    config = dataclasses.replace(
        TINY, num_heads=heads, num_kv_heads=num_kv_heads, vocab_size=draw(st.integers(3, 1000))
    )
    return config, draw(st.sampled_from([size for size in range(1, heads + 1) if heads % size == 0]))


@given(models_and_sizes())
def test_every_part_has_its_place(case: tuple[ModelConfig, int]) -> None:
    config, size = case
    shards = [Shard.of(config, rank, size) for rank in range(size)]
    assert [head for shard in shards for head in shard.query_heads] == list(range(config.num_heads))
    rows = [row for shard in shards for row in shard.vocabulary]
    assert rows == list(range(len(rows)))
    assert len(rows) >= config.vocab_size
    known = [row for shard in shards for row in shard.known_rows(config.vocab_size)]
    assert known == list(range(config.vocab_size))
    assert {len(shard.vocabulary) % 64 for shard in shards} == {0}
    assert len({len(shard.vocabulary) for shard in shards}) == 1


@given(models_and_sizes())
def test_a_query_head_reads_its_kv_head(case: tuple[ModelConfig, int]) -> None:
    """Also where the share of a rank cuts groups: what a kernel reads, head by head, is what the model says."""
    config, size = case
    group = config.num_heads // config.num_kv_heads
    for rank in range(size):
        shard = Shard.of(config, rank, size)
        assert set(shard.kv_heads) == {head // group for head in shard.query_heads}
        read = {}
        for part in shard.groups:
            per_kv_head, rest = divmod(len(part.query_heads), len(part.kv_heads))
            assert rest == 0
            for place, head in enumerate(part.query_heads):
                read[shard.query_heads[head]] = shard.kv_heads[part.kv_heads[place // per_kv_head]]
        assert read == {head: head // group for head in shard.query_heads}
        assert len(shard.groups) <= 3


def test_tiny_a() -> None:
    """6 query heads, 2 KV heads."""
    two, three = ([Shard.of(goldens.config(), rank, size) for rank in range(size)] for size in (2, 3))
    assert [shard.kv_heads for shard in two] == [range(1), range(1, 2)]
    assert [shard.kv_heads for shard in three] == [range(1), range(2), range(1, 2)]
    assert three[1].groups == (HeadGroup(range(2), range(2)),)
    assert [Shard.of(goldens.config(), rank, 6).kv_heads[0] for rank in range(6)] == [0, 0, 0, 1, 1, 1]


def test_grok_1() -> None:
    assert [most_kv_heads(GROK1, size) for size in (1, 2, 4, 8, 16, 48)] == [8, 4, 2, 1, 1, 1]
    assert {len(Shard.of(GROK1, rank, 16).groups) for rank in range(16)} == {1}
    # 16 query heads a rank, 6 to a KV head: the second has the end of one, one whole, the beginning of another...
    uneven = Shard.of(GROK1, 1, 3)
    assert uneven.kv_heads == range(2, 6)
    assert [len(part.query_heads) for part in uneven.groups] == [2, 12, 2]
    assert Shard.of(GROK1, 7, 8).vocabulary == range(7 * 16384, 8 * 16384), "nothing is filled up"


def test_one_rank_has_everything_and_no_row_more() -> None:
    config = dataclasses.replace(TINY, vocab_size=101)
    shard = Shard.whole(config)
    assert (shard.query_heads, shard.kv_heads, shard.vocabulary) == (range(4), range(2), range(101))
    assert len(shard.groups) == 1


@pytest.mark.parametrize("size", [4, 5, 7, 12])
def test_ranks_that_do_not_divide_the_heads(size: int) -> None:
    with pytest.raises(ConfigError, match=f"tensor_parallel is {size}, .* 6 query heads: 1, 2, 3, 6 do"):
        Shard.of(goldens.config(), 0, size)
