"""From rank to rank, by both ways; and sums whose order is the ranks'."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from attention_worker.sharding import WHOLE, Shard
from attention_worker.sharding import ranks as ranks_module
from attention_worker.sharding.messages import Messages
from attention_worker.sharding.ranks import Ranks
from grokmoe.model_config import TINY
from tests.attention_worker.ranks.rank_threads import on_all

SIZES = [2, 3, 4]
WAYS = pytest.mark.parametrize("by_collectives", [False, True], ids=["messages", "collectives"])


def part(rank: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank)).to(dtype)


def each(size: int, act: Callable[[Messages], torch.Tensor], by_collectives: bool = False) -> list[torch.Tensor]:
    return on_all(size, act, by_collectives)  # type: ignore[return-value]


@WAYS
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_all_have_what_each_had(size: int, dtype: torch.dtype, by_collectives: bool) -> None:
    found = each(size, lambda messages: messages.all(part(messages.rank, 3, 5).to(dtype)), by_collectives)
    expected = torch.stack([part(rank, 3, 5).to(dtype) for rank in range(size)])
    assert all(torch.equal(got_S, expected) for got_S in found)


@WAYS
@pytest.mark.parametrize("size", SIZES)
def test_each_gets_what_all_had_for_it(size: int, by_collectives: bool) -> None:
    found = each(size, lambda messages: messages.swap(part(messages.rank, size, 2, 4)), by_collectives)
    for rank, got_S in enumerate(found):
        assert torch.equal(got_S, torch.stack([part(other, size, 2, 4)[rank] for other in range(size)]))


@WAYS
def test_the_first_collects_and_tells(by_collectives: bool) -> None:
    def act(messages: Messages) -> tuple[torch.Tensor | None, torch.Tensor]:
        collected = messages.collect(part(messages.rank, 2, 3).T)  # of any layout
        told = part(7, 4, 4) if messages.rank == 0 else torch.empty(4, 4)
        (messages.hear if messages.rank else messages.tell)(told)
        return collected, told

    found = on_all(3, act, by_collectives)
    assert torch.equal(found[0][0], torch.stack([part(rank, 2, 3).T for rank in range(3)]))  # type: ignore[index]
    assert all(collected is None for collected, _ in found[1:])  # type: ignore[misc]
    assert all(torch.equal(told, part(7, 4, 4)) for _, told in found)  # type: ignore[misc]


@WAYS
def test_nothing_is_no_message(by_collectives: bool) -> None:
    """A step may want no logits at all."""
    found = each(2, lambda messages: messages.all(torch.empty(0, 5)), by_collectives)
    assert [got_S.shape for got_S in found] == [(2, 0, 5)] * 2
    collected = on_all(2, lambda messages: messages.collect(torch.empty(0, 5)), by_collectives)
    assert collected[0].shape == (2, 0, 5)  # type: ignore[attr-defined]


def sharded(act: Callable[[Ranks], torch.Tensor], vocab_size: int = 256) -> Callable[[Messages], torch.Tensor]:
    config = dataclasses.replace(TINY, num_heads=12, num_kv_heads=12, vocab_size=vocab_size)
    return lambda messages: act(Ranks(messages, Shard.of(config, messages.rank, messages.size), vocab_size))


def in_order(size: int, *shape: int) -> torch.Tensor:
    total = part(0, *shape)
    for rank in range(1, size):
        total = total + part(rank, *shape)
    return total


@WAYS
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("share_bytes", [0, 10**9], ids=["by shares", "at once"])
@pytest.mark.parametrize("num_rows", [1, 2, 7, 64])
def test_a_sum_is_taken_in_the_order_of_the_ranks(
    monkeypatch: pytest.MonkeyPatch, size: int, share_bytes: int, num_rows: int, by_collectives: bool
) -> None:
    """To the bit, on every rank, however it is exchanged; so a row's sum does not depend on the rows beside it."""
    monkeypatch.setattr(ranks_module, "SHARE_BYTES", share_bytes)
    expected = in_order(size, num_rows, 40)

    def act(messages: Messages) -> torch.Tensor:
        return sharded(lambda ranks: ranks.sum(part(messages.rank, num_rows, 40), torch.float32))(messages)

    assert all(torch.equal(found, expected) for found in each(size, act, by_collectives))


def test_another_order_would_give_other_bits() -> None:
    """What the test above can see."""
    other = part(2, 64, 40) + part(1, 64, 40) + part(0, 64, 40)
    assert not torch.equal(in_order(3, 64, 40), other)


def test_a_sum_is_rounded_once() -> None:
    def act(messages: Messages) -> torch.Tensor:
        return sharded(lambda ranks: ranks.sum(part(messages.rank, 9, 40), torch.bfloat16))(messages)

    assert all(torch.equal(found, in_order(3, 9, 40).bfloat16()) for found in each(3, act))


@pytest.mark.parametrize("vocab_size", [70, 128, 200, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_embedding_of_all_ranks_is_the_whole_table_s(vocab_size: int, dtype: torch.dtype) -> None:
    """70 rows: the second rank of two has 6, the third of three none at all."""
    table_VD, token_ids_T = part(0, vocab_size, 16).to(dtype), torch.tensor([0, vocab_size - 1, 63, 64, 5, 5])
    for size in (2, 3):
        padded_VD = torch.nn.functional.pad(table_VD, (0, 0, 0, 10**3))

        def act(messages: Messages, padded_VD: torch.Tensor = padded_VD) -> torch.Tensor:
            def embed(ranks: Ranks) -> torch.Tensor:
                vocabulary = ranks._shard.vocabulary
                return ranks.embed(padded_VD[vocabulary.start : vocabulary.stop], token_ids_T, 1.7)

            return sharded(embed, vocab_size)(messages)

        assert all(torch.equal(found, WHOLE.embed(table_VD, token_ids_T, 1.7)) for found in each(size, act))


@pytest.mark.parametrize("vocab_size", [70, 200, 256])
def test_logits_are_joined_without_what_fills_up(vocab_size: int) -> None:
    logits_RV = part(0, 5, vocab_size)

    def act(messages: Messages) -> torch.Tensor:
        def join(ranks: Ranks) -> torch.Tensor:
            vocabulary = ranks._shard.vocabulary
            padded_RV = torch.nn.functional.pad(logits_RV, (0, 10**3), value=torch.nan)
            return ranks.join(padded_RV[:, vocabulary.start : vocabulary.stop])

        return sharded(join, vocab_size)(messages)

    assert torch.equal(each(3, act)[0], logits_RV)
