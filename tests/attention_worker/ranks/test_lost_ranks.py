"""Ranks that end, hang, or are asked to end; and what a follower is told."""

from __future__ import annotations

import time

import pytest
import torch

from attention_worker.engine import MoeInput
from attention_worker.ranks.orders import Order, OrderKind, Orders
from attention_worker.sharding.messages import Messages, RankLost
from grokmoe.step_plan import GREEDY, Penalties, SequenceChunk, StepPlan, TokenSampling, TokenScoring
from tests import goldens
from tests.attention_worker.ranks.rank_threads import CPU, on_all, rank_threads, wait_until
from tests.attention_worker.tiny_engine import fill

PROMPT = tuple(goldens.PROMPTS["len7"])
CHUNK = SequenceChunk(PROMPT, 0, (1,), GREEDY)
SHORT = 0.5


def test_a_resting_worker_lives_on() -> None:
    """Longer than a rank may be silent: the heart beats."""
    with rank_threads(3, goldens.DIRECTORY, fill, timeout=SHORT) as worker:
        time.sleep(4 * SHORT)
        assert worker.step(CHUNK).token_ids == (goldens.greedy("seed", "len7")[0],)
        assert (worker.failures, worker.leaves) == ([], [])


def test_a_step_may_wait_for_its_experts_for_longer_than_a_rank_may_be_silent() -> None:
    with rank_threads(2, goldens.DIRECTORY, fill, timeout=SHORT) as worker:
        run = worker.begin(CHUNK)
        at = worker.advance(run, None)
        time.sleep(4 * SHORT)
        while isinstance(at, MoeInput):
            at = worker.advance(run, fill(at))
        assert at.token_ids == (goldens.greedy("seed", "len7")[0],)


def test_a_follower_that_hangs_is_noticed_at_rest() -> None:
    with rank_threads(2, goldens.DIRECTORY, fill, timeout=SHORT) as worker:
        begin = time.monotonic()
        worker.followers[0]._orders.host.hear = lambda *_: time.sleep(6 * SHORT)  # type: ignore[method-assign]
        wait_until(lambda: bool(worker.failures))
        assert time.monotonic() - begin < 4 * SHORT
        assert "a rank is lost" in worker.failures[0]


def test_a_follower_that_hangs_in_a_step_is_noticed() -> None:
    with rank_threads(2, goldens.DIRECTORY, fill, timeout=SHORT) as worker:
        run = worker.begin(CHUNK)
        at = worker.advance(run, None)
        assert isinstance(at, MoeInput)
        worker.engines[1]._model._sharding.sum = lambda *_: time.sleep(6 * SHORT)  # type: ignore[method-assign]
        begin = time.monotonic()
        with pytest.raises(RankLost):
            worker.advance(run, fill(at))
        assert time.monotonic() - begin < 3 * SHORT
        assert len(worker.failures) == 1
        assert "failed in the middle: RankLost" in worker.failures[0]


def test_a_follower_that_fails_says_why_and_the_leader_notices() -> None:
    with rank_threads(3, goldens.DIRECTORY, fill, timeout=SHORT) as worker:

        def broken(*_: object) -> None:
            raise MemoryError("no room on rank 2")

        worker.engines[2]._model._attend = broken  # type: ignore[method-assign, assignment]
        with pytest.raises(RankLost):
            worker.advance(worker.begin(CHUNK), None)
        with pytest.raises(MemoryError, match="rank 2"):
            worker.following[1].result(10)
        assert len(worker.failures) == 1


def test_a_failure_of_the_leader_s_own_is_the_worker_s() -> None:
    """The others are in the middle of a sum that it will never come to."""
    with rank_threads(2, goldens.DIRECTORY, fill, timeout=SHORT) as worker:

        def broken(*_: object) -> None:
            raise MemoryError("no room")

        worker.engine._model._attend = broken  # type: ignore[method-assign, assignment]
        with pytest.raises(MemoryError):
            worker.advance(worker.begin(CHUNK), None)
        assert worker.failures == ["a step failed in the middle: MemoryError: no room"]


def test_followers_of_a_leader_that_is_silent_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attention_worker.ranks.orders.PATIENCE", 2.0)
    with rank_threads(2, goldens.DIRECTORY, fill, timeout=SHORT) as worker:
        worker.devices[0].post(lambda: time.sleep(6 * SHORT))
        with pytest.raises(RankLost, match="Timed out"):
            worker.following[0].result(5 * SHORT)
        wait_until(lambda: bool(worker.failures))


def test_a_plan_that_is_refused_is_nobody_s_business() -> None:
    with rank_threads(2, goldens.DIRECTORY, fill) as worker:
        for chunk in (SequenceChunk((9999,), 0, (1,)), SequenceChunk(PROMPT, 0, (1, 2))):
            with pytest.raises(Exception, match=r"plan\.chunks"):
                worker.begin(chunk)
        worker.begin(CHUNK).close()  # and one that never begins
        assert worker.step(CHUNK).token_ids == (goldens.greedy("seed", "len7")[0],)


def test_a_follower_that_is_asked_to_end_takes_the_worker_with_it_in_order() -> None:
    with rank_threads(3, goldens.DIRECTORY, fill, timeout=SHORT) as worker:
        worker.followers[1].leaving.set()
        wait_until(lambda: bool(worker.leaves))
        time.sleep(2 * SHORT)
        assert (worker.leaves, worker.failures) == ([None], []), "said once, and nothing is broken off"
        assert worker.step(CHUNK).token_ids == (goldens.greedy("seed", "len7")[0],)


def test_what_a_follower_is_told_of_a_plan() -> None:
    """All that fills pages and chooses rows; not how a token is drawn, which may be as long as the vocabulary."""
    how = TokenSampling(
        temperature=1.0, allowed=b"\xff" * 16384, penalties=Penalties(1.5, prompt_ids=bytes(4000)), num_logprobs=5
    )
    chunks = (
        SequenceChunk(PROMPT, 40, (3, 1), how),
        SequenceChunk((5,), 0, (7,), None, scoring=TokenScoring(0, (4,), 2)),
    )
    plan = StepPlan("x", chunks, torch.randn(8, 6))

    def act(messages: Messages) -> object:
        orders = Orders(messages, messages, CPU)
        if messages.rank == 0:
            orders.tell_begin(3, plan)
            return orders.tell_go_on(4, torch.ones(2, 3, dtype=torch.bfloat16).T)
        order = orders.hear()
        return order, orders.hear_plan(order, 6), orders.hear(), orders.hear_rows(torch.empty(3, 2).bfloat16())

    told, heard = on_all(2, act)
    order, found, go_on, rows = heard  # type: ignore[misc]
    assert (order.kind, order.step, order.has_hidden) == (OrderKind.BEGIN, 3, True)
    assert order.num_bytes < 100
    assert found.chunks == (SequenceChunk(PROMPT, 40, (3, 1), GREEDY), chunks[1])
    assert torch.equal(found.hidden_state, plan.hidden_state)
    assert (go_on, rows.tolist()) == (Order(OrderKind.GO_ON, 4), [[1.0, 1.0]] * 3)
    assert torch.equal(told, rows)  # type: ignore[arg-type]


def test_an_order_that_there_is_not() -> None:
    with pytest.raises(ValueError, match="77"):
        Order.from_tensor(torch.tensor([77, 0, 0, 0]))
