"""Clock, routing and failures of a simulated cluster."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grokmoe.errors import ConfigError
from planner.experts_time import ExpertWork
from planner.simulated.clock import Clock, Server
from planner.simulated.expert_worker import ExpertCall, SimulatedExpertWorker
from planner.simulated.failures import HOUR, Failure, draw_failures, parse_failure
from planner.simulated.routing import NUM_KEPT, Routing
from router.dispatch import Shard


def test_events_come_in_order_and_equal_ones_as_they_were_asked_for() -> None:
    clock, told = Clock(), []
    for time, name in ((2.0, "c"), (1.0, "a"), (1.0, "b"), (9.0, "late")):
        clock.at(time, lambda name=name: told.append((clock.now, name)))
    clock.run(until=5.0)
    assert told == [(1.0, "a"), (1.0, "b"), (2.0, "c")]
    clock.at(0.5, lambda: told.append((clock.now, "at once")))
    clock.run(until=5.0)
    assert told[-1] == (2.0, "at once"), "time does not go back"
    assert clock.num_events == 4


def test_one_thing_after_another() -> None:
    clock, told = Clock(), []
    server = Server(clock)
    server.serve(2.0, lambda: told.append(clock.now))
    server.serve(3.0, lambda: told.append(clock.now))
    clock.after(9.0, lambda: server.serve(1.0, lambda: told.append(clock.now)))
    clock.run(until=100.0)
    assert told == [2.0, 5.0, 10.0]
    assert server.busy == 6.0


def test_what_a_server_forgets_it_was_not_busy_with() -> None:
    clock = Clock()
    server = Server(clock)
    server.serve(10.0, lambda: None)
    clock.after(4.0, server.forget)
    clock.run(until=5.0)
    assert server.busy == 4.0
    server.serve(1.0, lambda: None)
    clock.run(until=5.0)
    assert clock.now == 5.0


def call(layer: int, experts: dict[int, int], clock: Clock, told: list) -> ExpertCall:
    """Rows by expert; when it is answered or lost is told."""
    shard = Shard(0, tuple(experts), tuple(experts.values()), 0, sum(experts.values()))
    return ExpertCall(
        layer, shard, lambda each: told.append((clock.now, layer)), lambda each: told.append((clock.now, "lost"))
    )


def worker(load: dict[int, int]) -> tuple[Clock, SimulatedExpertWorker]:
    """Reading an expert takes a second, a row a tenth, a computation 0.5 beside them."""
    clock = Clock()
    work = ExpertWork(read=1.0, per_product_row=0.0, per_row=0.1, call=0.0, tile=1.0)
    return clock, SimulatedExpertWorker(clock, 0, work, 0.5, load)


def test_calls_of_one_layer_are_computed_together() -> None:
    told, load = [], {}
    clock, one = worker(load)
    one.take(call(0, {1: 1}, clock, told))
    for layer, experts in ((3, {1: 2, 2: 1}), (4, {1: 1}), (3, {2: 1})):
        one.take(call(layer, experts, clock, told))
    assert load == {0: 6}
    clock.run(until=100.0)
    # Alone 0.5 + 1 + 0.1; then both of layer 3, which read experts 1 and 2 once: 0.5 + 2 + 0.4; then layer 4.
    assert told == [
        (pytest.approx(1.6), 0),
        (pytest.approx(4.5), 3),
        (pytest.approx(4.5), 3),
        (pytest.approx(6.1), 4),
    ]
    assert load == {0: 0}
    assert one.busy == pytest.approx(6.1)


def test_what_a_lost_worker_was_asked_is_lost_and_noticed_later() -> None:
    told, load = [], {}
    clock, one = worker(load)
    for layer in (0, 1):
        one.take(call(layer, {1: 1}, clock, told))
    clock.after(1.0, lambda: one.fail(0.25))
    clock.after(1.1, lambda: one.take(call(2, {1: 1}, clock, told)))
    clock.run(until=100.0)
    assert told == [(1.1, "lost"), (1.25, "lost"), (1.25, "lost")]
    assert load == {0: 2}, "what is known of it, until somebody misses it"
    one.come_back()
    began = clock.now
    one.take(call(5, {1: 1}, clock, told))
    assert load == {0: 1}
    clock.run(until=100.0)
    assert told[-1] == (pytest.approx(began + 1.6), 5)


@given(num_tokens=st.integers(1, 40), skew=st.floats(0, 2), top_k=st.integers(1, 4))
def test_no_token_goes_to_an_expert_twice(num_tokens, skew, top_k) -> None:
    routing = Routing(2, 6, top_k, skew, seed=1)
    for _ in range(3):
        ids_TK = routing.draw(1, num_tokens).numpy()
        assert ids_TK.shape == (num_tokens, top_k)
        assert all(len(set(row)) == top_k for row in ids_TK.tolist())
        assert ids_TK.min() >= 0
        assert ids_TK.max() < 6


def test_draws_are_even_or_skewed_by_layer() -> None:
    def counts(skew: float, layer: int) -> np.ndarray:
        ids = Routing(2, 8, 2, skew, seed=3).draw(layer, 4000).numpy()
        return np.bincount(ids.ravel(), minlength=8)

    even = counts(0.0, 0)
    assert even.sum() == 8000
    assert even.max() < 1.2 * even.min()
    first, second = counts(1.5, 0), counts(1.5, 1)
    assert first.max() > 5 * first.min()
    assert first.argmax() != second.argmax(), "drawn with this seed"


def test_draws_are_kept_and_picked() -> None:
    routing = Routing(1, 8, 2, 0.0, seed=0)
    drawn = {id(routing.draw(0, 3)) for _ in range(400)}
    assert len(drawn) == NUM_KEPT


def test_failures_as_text() -> None:
    assert parse_failure("expert:3@10s+30s") == Failure(10.0, "expert", 3, 30.0)
    assert parse_failure("router:0@1.5") == Failure(1.5, "router", 0, None)
    for text in ("", "expert@1s", "gpu:1@1s", "expert:1", "expert:-1@1s", "expert:1@1s+", "expert:1@xs"):
        with pytest.raises(ConfigError, match="failure"):
            parse_failure(text)


def test_failures_drawn_have_the_mean_that_was_asked_for() -> None:
    counts = {"expert": 400, "router": 100}
    found = draw_failures(counts, mean_hours=2.0, lasts=60.0, seconds=10 * HOUR, seed=1)
    assert found == sorted(found)
    assert len(found) == pytest.approx(500 * 10 / (2 + 60 / HOUR), rel=0.08)
    assert {each.role for each in found} == {"expert", "router"}
    assert all(each.index < counts[each.role] and each.lasts == 60.0 for each in found)
    for index in range(5):
        times = [each.at for each in found if (each.role, each.index) == ("expert", index)]
        assert all(later - sooner >= 60 for sooner, later in itertools.pairwise(times))
    assert draw_failures(counts, 2.0, 60.0, 10 * HOUR, 1) == found
