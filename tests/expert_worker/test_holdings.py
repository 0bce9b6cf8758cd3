"""What is held, loaded and given up: every order of events, against a model that knows one word per cell."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from expert_worker.cells import Cell, Cells
from expert_worker.holdings import FIRST_REVISION, Holdings
from grokmoe.errors import ConfigError, Reason, ResourceExhausted

LINGER = 10.0
CAPACITY = 6
CELLS = st.frozensets(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=5)


class HoldingsMachine(RuleBasedStateMachine):
    """`state` has the cells that are not absent: held, lingering (until when), freeing; and what is being loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.holdings = Holdings(frozenset({(0, 0)}), CAPACITY)
        self.now = 0.0
        self.state: dict[Cell, str] = {(0, 0): "held"}
        self.until: dict[Cell, float] = {}
        self.loading: Cells | None = None
        self.revision = FIRST_REVISION

    def _in(self, state: str) -> Cells:
        return frozenset(cell for cell, word in self.state.items() if word == state)

    @precondition(lambda self: self.loading is None)
    @rule(wanted=CELLS)
    def begin(self, wanted: Cells) -> None:
        fits = len(self._in("held") | wanted) <= CAPACITY
        busy = wanted & self._in("freeing")
        if not fits and not busy:
            with pytest.raises(ResourceExhausted) as raised:
                self.holdings.must_wait(wanted)
            assert raised.value.reason is Reason.NO_ROOM
            return
        waits = self.holdings.must_wait(wanted)
        assert waits == bool(busy or len(self.state.keys() | wanted) > CAPACITY)
        if not waits:
            missing = self.holdings.begin_load(wanted)
            assert missing == wanted - self.state.keys()
            self.loading = wanted - self._in("held")

    @precondition(lambda self: self.loading is not None)
    @rule()
    def finish(self) -> None:
        assert self.loading is not None
        self.holdings.finish_load()
        self.revision += bool(self.loading)
        self.state |= dict.fromkeys(self.loading, "held")
        self.loading = None

    @precondition(lambda self: self.loading is not None)
    @rule()
    def abandon(self) -> None:
        assert self.loading is not None
        due = self.holdings.abandon_load()
        assert due == self.loading - self.state.keys()
        self.state |= dict.fromkeys(due, "freeing")
        self.loading = None

    @rule(unwanted=CELLS)
    def give_up(self, unwanted: Cells) -> None:
        gone = self._in("held") & unwanted
        self.holdings.give_up(unwanted, self.now + LINGER)
        self.revision += bool(gone)
        self.state |= dict.fromkeys(gone, "lingering")
        self.until |= dict.fromkeys(gone, self.now + LINGER)

    @rule(seconds=st.sampled_from([0.0, 3.0, 10.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        due = self.holdings.begin_free(self.now)
        wanted = {c for c in self._in("lingering") - (self.loading or frozenset()) if self.until[c] <= self.now}
        assert due == wanted
        self.state |= dict.fromkeys(due, "freeing")

    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        freed = data.draw(st.sets(st.sampled_from(sorted(self._in("freeing"))))) if self._in("freeing") else set()
        self.holdings.finish_free(frozenset(freed))
        for cell in freed:
            del self.state[cell]

    @invariant()
    def agrees(self) -> None:
        loading = self.loading or frozenset()
        assert self.holdings.held == self._in("held")
        assert self.holdings.lingering == self._in("lingering")
        assert self.holdings.freeing == self._in("freeing")
        assert self.holdings.loading == loading
        assert self.holdings.revision == self.revision
        assert len(self.holdings.resident) <= CAPACITY
        times = [self.until[cell] for cell in self._in("lingering") - loading]
        assert self.holdings.next_expiry() == min(times, default=None)


TestHoldings = HoldingsMachine.TestCase
TestHoldings.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


def test_more_than_the_capacity_from_the_start() -> None:
    with pytest.raises(ConfigError, match=r"names 3 .* capacity is 2"):
        Holdings(frozenset({(0, 0), (0, 1), (1, 0)}), 2)


def test_without_a_capacity_nothing_waits_for_room() -> None:
    holdings = Holdings()
    assert not holdings.must_wait(frozenset((layer, 0) for layer in range(10_000)))
