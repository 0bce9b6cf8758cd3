"""A sequence's state machine, and the queue that keeps sequences in order of arrival."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grokmoe.errors import InternalError, InvalidRequest
from router.request import Request
from router.scheduler.queue import SequenceQueue
from router.sequence import FinishReason, Sequence, SequenceState


def make(prompt: tuple[int, ...] = (1, 2, 3), arrival: int = 0) -> Sequence:
    return Sequence(Request(request_id=f"r{arrival}", prompt_ids=prompt, max_tokens=4), arrival)


def test_a_life_without_trouble() -> None:
    sequence = make()
    assert sequence.state is SequenceState.WAITING
    sequence.admit((7,), num_cached_tokens=0)
    assert (sequence.state, sequence.num_to_compute) == (SequenceState.RUNNING, 3)

    sequence.num_computed = 3
    sequence.append(8)
    assert sequence.num_to_compute == 1, "decode"
    sequence.num_computed = 4
    sequence.append(9)
    sequence.finish(FinishReason.STOP)
    assert sequence.output_ids == [8, 9]
    assert sequence.all_ids == [1, 2, 3, 8, 9]
    assert sequence.is_over
    assert sequence.drop_pages() == (7,)


def test_preemption_keeps_the_tokens_and_forgets_the_pages() -> None:
    sequence = make()
    sequence.admit((7,), num_cached_tokens=2)
    sequence.num_computed = 3
    sequence.append(8)
    assert sequence.drop_pages() == (7,)
    sequence.requeue()
    assert sequence.state is SequenceState.WAITING
    assert (sequence.output_ids, sequence.num_to_compute) == ([8], 4)

    sequence.admit((5, 6), num_cached_tokens=0)
    assert sequence.num_cached_tokens == 2, "a client sees the hits of the first admission"
    assert sequence.num_admissions == 2


def test_cancelled_from_waiting_and_from_running() -> None:
    waiting, running = make(), make()
    running.admit((7,), 0)
    for sequence in (waiting, running):
        sequence.cancel()
        assert sequence.is_over
        assert sequence.finish_reason is None


def test_the_request_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().request.max_tokens = 5  # type: ignore[misc]


def test_transitions_that_only_a_bug_takes() -> None:
    sequence = make()
    with pytest.raises(AssertionError):
        sequence.finish(FinishReason.STOP)
    with pytest.raises(AssertionError):
        sequence.append(1)
    sequence.admit((7,), 0)
    with pytest.raises(AssertionError):
        sequence.append(1)
    with pytest.raises(AssertionError):
        sequence.requeue()
    sequence.in_flight = True
    with pytest.raises(AssertionError):
        sequence.drop_pages()
    sequence.cancel()
    with pytest.raises(AssertionError):
        sequence.cancel()
    with pytest.raises(AssertionError, match="at least one token"):
        make(())


@given(st.permutations(range(8)), st.integers(0, 7))
def test_the_queue_is_in_order_of_arrival(arrivals: list[int], removed: int) -> None:
    queue = SequenceQueue()
    sequences = {arrival: make(arrival=arrival) for arrival in arrivals}
    for sequence in sequences.values():
        queue.add(sequence)
    queue.remove(sequences[removed])
    expected = [sequences[arrival] for arrival in range(8) if arrival != removed]
    assert list(queue) == expected
    assert list(reversed(queue)) == expected[::-1]
    assert queue.oldest is expected[0]
    with pytest.raises(AssertionError, match="not in the queue"):
        queue.remove(sequences[removed])
    with pytest.raises(AssertionError, match="not unique"):
        queue.add(make(arrival=expected[0].arrival))


class FakeConstraint:
    """A structured output that takes the tokens of a script, then says what the test wants."""

    def __init__(self, script: list[int], fails_at: str = "") -> None:
        self.script, self.fails_at, self.is_complete = script, fails_at, not script

    def start(self) -> FakeConstraint:
        return self

    def allowed(self) -> bytes:
        if self.fails_at == "allowed":
            raise InvalidRequest("structured.regex", "costs too much")
        return b"\xff" * 4

    def accept(self, token_id: int) -> bool:
        if self.fails_at == "accept":
            raise InvalidRequest("structured.regex", "costs too much")
        fits = self.script.pop(0) == token_id
        self.is_complete = not self.script
        return fits


class TestConstraint:
    def drawn(self, constraint: FakeConstraint, token_id: int) -> Sequence:
        request = Request(request_id="r", prompt_ids=(1,), max_tokens=4, grammar=constraint)
        sequence = Sequence(request, 0)
        sequence.admit((7,), 0)
        sequence.num_computed = 1
        sequence.append(token_id)
        return sequence

    def test_it_ends_when_complete(self) -> None:
        assert self.drawn(FakeConstraint([5, 6]), 5).end_reason is None
        assert self.drawn(FakeConstraint([5]), 5).end_reason is FinishReason.STOP

    def test_what_cannot_go_on_is_an_error_of_the_sequence_and_not_of_the_step(self) -> None:
        refused = self.drawn(FakeConstraint([5, 6]), 9)
        assert refused.end_reason is FinishReason.ERROR
        assert isinstance(refused.error, InternalError)
        costly = self.drawn(FakeConstraint([5, 6], fails_at="accept"), 5)
        assert costly.end_reason is FinishReason.ERROR
        assert isinstance(costly.error, InvalidRequest)

    def test_what_cannot_begin_is_refused(self) -> None:
        for constraint in (FakeConstraint([]), FakeConstraint([5], fails_at="allowed")):
            with pytest.raises(InvalidRequest, match="structured"):
                Sequence(Request(request_id="r", prompt_ids=(1,), grammar=constraint), 0)
