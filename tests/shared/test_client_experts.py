"""Moving experts through the SDK: what goes over the wire, what comes back, and that no move is sent twice."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest

import grokmoe
from grokmoe import ExpertMove, ExpertRange, MoveCost, Reason, Rebalance
from grokmoe.client import MOVE_TIMEOUT
from tests.shared.client_calls import Ask, ask_async, ask_sync
from tests.shared.fake_generation import FakeServer

MOVE = ExpertMove((ExpertRange(1, 0, 1),), "e:0", "e:1", "loading")


@pytest.fixture(params=[ask_sync, ask_async])
def ask(request: pytest.FixtureRequest) -> Ask:
    return request.param


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


@pytest.mark.parametrize(
    ("experts", "ranges"),
    [
        (3, [(3, 0, 0)]),
        (ExpertRange(3, 1, 2), [(3, 1, 2)]),
        ([0, ExpertRange(7, 2)], [(0, 0, 0), (7, 2, 0)]),
    ],
)
def test_a_move(server: FakeServer, ask: Ask, experts: object, ranges: list[tuple[int, int, int]]) -> None:
    assert ask(server.address, "move_experts", experts, source="e:0", target="e:1") == MoveCost(1000, 1.5, 0.25, 8)
    (request,) = server.generation.requests
    assert [(each.expert, each.layer_begin, each.layer_end) for each in request.experts] == ranges
    assert (getattr(request, "from"), request.to) == ("e:0", "e:1")
    assert server.generation.deadlines == [pytest.approx(MOVE_TIMEOUT, rel=0.02)]


def test_a_copy_and_a_drop(server: FakeServer, ask: Ask) -> None:
    ask(server.address, "move_experts", 3, target="e:1")
    ask(server.address, "move_experts", 3, source="e:0", timeout=9.0)
    copy, drop = server.generation.requests
    assert (getattr(copy, "from"), copy.to) == ("", "e:1")
    assert (getattr(drop, "from"), drop.to) == ("e:0", "")
    assert server.generation.deadlines[1] == pytest.approx(9.0, abs=2.0)


def test_a_rebalance(server: FakeServer, ask: Ask) -> None:
    assert ask(server.address, "rebalance_experts", dry_run=True) == Rebalance(
        (MOVE,), 2.0, 1.0, 30.0, 4.0, False, "not asked to"
    )
    assert ask(server.address, "rebalance_experts", force=True).done
    assert [(each.dry_run, each.force) for each in server.generation.requests] == [(True, False), (False, True)]


def test_what_status_says_of_experts(server: FakeServer, ask: Ask) -> None:
    status = ask(server.address, "status")
    worker = status.workers[1]
    assert worker.held == (ExpertRange(0, 0, 2), ExpertRange(1, 1, 2))
    assert worker.loading == (ExpertRange(1, 0, 1),)
    assert worker.rows_per_second == 12.5
    assert (status.placement_version, status.imbalance, status.moves) == (7, 1.5, (MOVE,))


@pytest.mark.parametrize("method", ["move_experts", "rebalance_experts"])
def test_nothing_is_sent_twice(server: FakeServer, ask: Ask, method: str) -> None:
    """A call that was lost may have been heard, and a second move of the same is another one."""
    server.generation.failures = [grpc.StatusCode.UNAVAILABLE]
    with pytest.raises(grokmoe.Unavailable):
        ask(server.address, method, *((3,) if method == "move_experts" else ()))
    assert len(server.generation.requests) == 1


def test_refusals_have_their_reasons(server: FakeServer, ask: Ask) -> None:
    server.generation.failures = [grokmoe.FailedPrecondition("the last one", reason=Reason.LAST_HOLDER)]
    with pytest.raises(grokmoe.FailedPrecondition) as caught:
        ask(server.address, "move_experts", 3, source="e:0")
    assert caught.value.reason is Reason.LAST_HOLDER
