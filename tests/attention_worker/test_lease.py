"""The lease of an attention worker's pages, with a clock that the test turns."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from attention_worker.lease import Lease
from grokmoe.errors import Reason, Unavailable


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def numbered() -> Callable[[], str]:
    numbers = itertools.count(1)
    return lambda: f"incarnation {next(numbers)}"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def lease(clock: Clock) -> Lease:
    return Lease("first", 10.0, 1.0, clock, numbered())


def refusal(lease: Lease, router_id: str) -> Unavailable:
    with pytest.raises(Unavailable) as caught:
        lease.claim(router_id)
    return caught.value


def test_the_first_holder_gets_the_first_incarnation(lease: Lease) -> None:
    assert lease.seconds_left == 0
    assert lease.claim("a") == lease.incarnation == "first"
    assert lease.holder == "a"


def test_another_is_told_who_has_it_since_when_and_when_to_ask_again(lease: Lease, clock: Clock) -> None:
    lease.claim("a")
    lease.stream_opened("first")
    clock.now = 3.0
    error = refusal(lease, "b")
    assert error.message == "leased by router a for 3.0 s; free 7.0 s after its last sign of life"
    assert (error.retry_after, error.reason) == (7.0, Reason.WORKER_UNAVAILABLE)
    assert (lease.holder, lease.incarnation) == ("a", "first")


@pytest.mark.parametrize("has_stream", [True, False])
def test_it_ends_after_silence_and_not_before(lease: Lease, clock: Clock, has_stream: bool) -> None:
    lease.claim("a")
    if has_stream:
        lease.stream_opened("first")
    silence = 10.0 if has_stream else 1.0
    clock.now = silence - 0.001
    refusal(lease, "b")
    clock.now = silence
    assert lease.claim("b") == "incarnation 1"
    refusal(lease, "a")


def test_a_holder_that_comes_back_first_has_lost_nothing(lease: Lease, clock: Clock) -> None:
    lease.claim("a")
    clock.now = 1000.0
    assert lease.claim("a") == "first"


def test_a_holder_that_comes_back_after_another_gets_other_pages(lease: Lease, clock: Clock) -> None:
    lease.claim("a")
    clock.now = 20.0
    lease.claim("b")
    clock.now = 40.0
    assert lease.claim("a") == "incarnation 2"


def test_signs_of_life_of_the_last_holder_count_for_nothing(lease: Lease, clock: Clock) -> None:
    lease.claim("a")
    lease.stream_opened("first")
    clock.now = 10.0
    lease.claim("b")
    lease.stream_closed("first")
    lease.renew("first")
    lease.stream_opened("first")
    clock.now = 10.9
    assert lease.seconds_left == pytest.approx(0.1)
    clock.now = 11.0
    assert lease.claim("c") == "incarnation 2"


@pytest.mark.parametrize("sign", ["claim", "renew", "stream_opened", "stream_closed"])
def test_every_sign_of_life_renews(lease: Lease, clock: Clock, sign: str) -> None:
    lease.claim("a")
    lease.stream_opened("first")
    lease.stream_opened("first")
    clock.now = 9.0
    getattr(lease, sign)("a" if sign == "claim" else "first")
    assert lease.seconds_left == 10.0


def test_one_stream_of_two_that_is_open_keeps_it(lease: Lease, clock: Clock) -> None:
    lease.claim("a")
    lease.stream_opened("first")
    lease.stream_opened("first")
    lease.stream_closed("first")
    clock.now = 5.0
    refusal(lease, "b")
    lease.stream_closed("first")
    clock.now = 6.0
    lease.claim("b")


def test_a_lease_shorter_than_the_moment_is_as_short_without_streams(clock: Clock) -> None:
    lease = Lease("first", 0.5, 1.0, clock)
    lease.claim("a")
    clock.now = 0.5
    assert lease.claim("b") != "first"


class Routers(RuleBasedStateMachine):
    """Routers that ask, step, open and close streams as they like: two never hold pages of one name."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.lease = Lease("first", 10.0, 1.0, self.clock, numbered())
        self.known: dict[str, str] = {}
        self.open: list[str] = []
        self.named: dict[str, str] = {}

    @rule(router=st.sampled_from("abc"))
    def ask(self, router: str) -> None:
        left, holder = self.lease.seconds_left, self.lease.holder
        try:
            incarnation = self.lease.claim(router)
        except Unavailable:
            assert left > 0
            assert router != holder
        else:
            assert left == 0 or router == holder
            assert self.named.setdefault(incarnation, router) == router, "pages of two routers under one name"
            self.known[router] = incarnation

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        self.lease.renew(self.known[data.draw(st.sampled_from(sorted(self.known)))])

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def open_stream(self, data: st.DataObject) -> None:
        self.open.append(self.known[data.draw(st.sampled_from(sorted(self.known)))])
        self.lease.stream_opened(self.open[-1])

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def close_stream(self, data: st.DataObject) -> None:
        # A worker counts a stream for the incarnation that it was opened under, and only if that was current then.
        self.lease.stream_closed(self.open.pop(data.draw(st.integers(0, len(self.open) - 1))))

    @rule(seconds=st.sampled_from([0.5, 1.0, 4.0, 10.0]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @invariant()
    def lasts_at_most_its_time(self) -> None:
        assert 0 <= self.lease.seconds_left <= 10.0
        assert self.lease._num_streams == sum(each == self.lease.incarnation for each in self.open)


TestRouters = Routers.TestCase
