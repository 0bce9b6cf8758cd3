"""The scheduler against a fake worker: examples by topic, then a state machine that tries everything in any order.

The fake worker has a KV store that holds, in the slot of a position, a digest of all tokens up to it. It draws the
next token from the digests it reads through the page table it is given, and refuses to read a slot that holds anything
but what the true text put there. A wrong page table, a recomputation left out, a page shared before it was computed or
freed while in use all show up as a wrong slot.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from grokmoe.errors import ConfigError, InvalidRequest
from router import pages
from router.pages import PageLedger
from router.request import Request
from router.scheduler import Scheduler
from router.sequence import FinishReason, Sequence, SequenceState
from router.step import Chunk, SchedulerSettings, Step

VOCAB_SIZE = 3
GARBAGE = b"garbage"


def digest(before: bytes, token_id: int) -> bytes:
    return hashlib.blake2b(before + bytes([token_id]), digest_size=8).digest()


def digests(token_ids: list[int]) -> list[bytes]:
    """What a correct KV store holds in the slots of a text."""
    state, states = b"", []
    for token_id in token_ids:
        state = digest(state, token_id)
        states.append(state)
    return states


def next_token(state: bytes) -> int:
    return state[0] % VOCAB_SIZE


def generate(request: Request, context_length: int) -> list[int]:
    """What the model answers, computed without pages, batches or steps."""
    token_ids = list(request.prompt_ids)
    if request.max_tokens == 0:
        return []
    while True:
        token_ids.append(next_token(digests(token_ids)[-1]))
        output = token_ids[len(request.prompt_ids) :]
        is_stopped = output[-1] in request.stop_ids and len(output) >= request.min_tokens
        if is_stopped or len(output) == request.max_tokens or len(token_ids) == context_length:
            return output


class FakeWorker:
    """Pages of slots. Between `begin` and `end` of a step, what it writes is garbage to everyone else."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.slots: dict[tuple[int, int], bytes] = {}

    def slot(self, chunk: Chunk, position: int) -> tuple[int, int]:
        return chunk.page_ids[position // self.page_size], position % self.page_size

    def read(self, chunk: Chunk) -> bytes:
        """Reads the chunk's past as attention does; returns the digest of its last position."""
        true_ids = chunk.sequence.all_ids[: chunk.end]
        assert list(chunk.token_ids) == true_ids[chunk.start :]
        states = digests(true_ids)
        for position in range(chunk.start):
            assert self.slots[self.slot(chunk, position)] == states[position], f"position {position} of {chunk}"
        return states[chunk.start - 1] if chunk.start else b""

    def begin(self, step: Step) -> None:
        for chunk in step.chunks:
            assert len(chunk.page_ids) == -(-chunk.end // self.page_size)
            self.read(chunk)
        for chunk in step.chunks:
            for position in range(chunk.start, chunk.end):
                self.slots[self.slot(chunk, position)] = GARBAGE
        for chunk in step.chunks:
            self.read(chunk)  # nobody writes what another one of the step reads

    def end(self, step: Step) -> list[int]:
        drawn: list[int] = []
        for chunk in step.chunks:
            state = self.read(chunk)
            for position, token_id in enumerate(chunk.token_ids, chunk.start):
                assert self.slots[self.slot(chunk, position)] == GARBAGE, f"position {position} is not ours alone"
                state = digest(state, token_id)
                self.slots[self.slot(chunk, position)] = state
            if chunk.wants_token:
                drawn.append(next_token(state))
        return drawn


class Bench:
    """A scheduler, its ledger and a fake worker, and what clients have received."""

    def __init__(self, num_pages: int = 16, page_size: int = 4, **changes: float | None) -> None:
        options = {"context_length": 64, "admission_watermark": 0.0, **changes}
        self.settings = SchedulerSettings(**options)  # type: ignore[arg-type]
        self.ledger = PageLedger(num_pages, page_size)
        self.scheduler = Scheduler(self.settings, self.ledger)
        self.worker = FakeWorker(page_size)
        self.received: dict[Sequence, list[int]] = {}
        self.in_flight: list[Step] = []

    def add(
        self, prompt: str | list[int], max_tokens: int = 4, stop_ids: tuple[int, ...] = (), **options: Any
    ) -> Sequence:
        """Adds a request; a prompt in letters is easier to read: "abca" is [0, 1, 2, 0]."""
        prompt_ids = tuple("abc".index(token) if isinstance(token, str) else token for token in prompt)
        arrival = len(self.received)
        request = Request(
            request_id=f"r{arrival}",
            prompt_ids=prompt_ids,
            max_tokens=max_tokens,
            stop_ids=frozenset(stop_ids),
            **options,
        )
        sequence = Sequence(request, arrival)
        self.scheduler.add(sequence)
        self.received[sequence] = []
        return sequence

    def begin(self) -> Step | None:
        step = self.scheduler.schedule()
        if step is not None:
            assert 0 < step.num_tokens <= self.settings.max_step_tokens
            self.worker.begin(step)
            self.in_flight.append(step)
        return step

    def end(self, step: Step) -> None:
        self.in_flight.remove(step)
        for drawn in self.scheduler.complete(step, self.worker.end(step)):
            assert (drawn.token_id is None) == (drawn.sequence.request.max_tokens == 0)
            if drawn.token_id is not None:
                self.received[drawn.sequence].append(drawn.token_id)
            assert drawn.sequence.finish_reason is drawn.finish_reason

    def fail(self, step: Step) -> None:
        self.in_flight.remove(step)
        self.scheduler.fail(step)

    def step(self) -> list[tuple[Sequence, int, int]]:
        """Runs one step; returns (sequence, first position, tokens) of each chunk."""
        step = self.begin()
        assert step is not None
        self.end(step)
        return [(chunk.sequence, chunk.start, len(chunk.token_ids)) for chunk in step.chunks]

    def run(self) -> int:
        """Runs until nothing is left, lanes ending in turn; returns the number of steps."""
        num_steps = 0
        # Each step of the oldest sequence brings it nearer to its end; the rest is slack for recomputation.
        most = 10 + sum(s.num_tokens + s.request.max_tokens for s in self.received) * (1 + len(self.received))
        while True:
            while self.begin() is not None:
                pass
            if not self.in_flight:
                break
            self.end(self.in_flight[0])
            self.scheduler.check()
            num_steps += 1
            assert num_steps <= most, "no progress"
        assert (self.scheduler.num_waiting, self.scheduler.num_running, self.ledger.num_used) == (0, 0, 0)
        return num_steps

    def check_answers(self) -> None:
        """Every client has the whole answer, or if it left, a part of it."""
        for sequence, tokens in self.received.items():
            expected = generate(sequence.request, self.settings.context_length)
            if sequence.state is SequenceState.CANCELLED:
                assert tokens == expected[: len(tokens)]
            else:
                assert sequence.state is SequenceState.FINISHED
                assert tokens == expected == sequence.output_ids


class TestBatching:
    def test_one_request(self) -> None:
        bench = Bench()
        sequence = bench.add("abc", max_tokens=3)
        assert bench.step() == [(sequence, 0, 3)]
        assert bench.step() == [(sequence, 3, 1)]
        assert bench.step() == [(sequence, 4, 1)]
        assert sequence.finish_reason is FinishReason.LENGTH
        assert bench.begin() is None
        bench.check_answers()

    def test_a_request_joins_while_others_decode(self) -> None:
        bench = Bench()
        first = bench.add("abc")
        bench.step()
        second = bench.add("bb")
        assert bench.step() == [(first, 3, 1), (second, 0, 2)]
        assert bench.step() == [(first, 4, 1), (second, 2, 1)]

    def test_a_long_prompt_is_cut_and_decodes_go_first(self) -> None:
        bench = Bench(max_step_tokens=4)
        short = bench.add("a", max_tokens=9)
        long = bench.add("abcabcabc")
        third = bench.add("c")
        assert bench.step() == [(short, 0, 1), (long, 0, 3)]
        assert bench.step() == [(short, 1, 1), (long, 3, 3)]
        assert bench.step() == [(short, 2, 1), (long, 6, 3)]
        assert bench.step() == [(short, 3, 1), (long, 9, 1), (third, 0, 1)]
        bench.run()
        bench.check_answers()

    def test_a_chunk_limit_leaves_room_for_others(self) -> None:
        bench = Bench(max_step_tokens=8, max_chunk_tokens=3)
        long, short = bench.add("abcabc"), bench.add("bb")
        assert bench.step() == [(long, 0, 3), (short, 0, 2)]

    def test_only_the_last_chunk_of_a_prompt_draws(self) -> None:
        bench = Bench(max_step_tokens=4)
        bench.add("abcabc")
        first = bench.begin()
        assert first is not None
        assert [chunk.wants_token for chunk in first.chunks] == [False]
        bench.end(first)
        second = bench.begin()
        assert second is not None
        assert [chunk.wants_token for chunk in second.chunks] == [True]

    def test_admission_is_first_come_first_served(self) -> None:
        bench = Bench(num_pages=4, max_running=2)
        first, big, small = bench.add("abca", max_tokens=8), bench.add("bcabcabcabca"), bench.add("a")
        assert bench.step() == [(first, 0, 4), (big, 0, 12)], "max_running"
        bench = Bench(num_pages=4)
        first, big, small = bench.add("abcab"), bench.add("bbbbbbbbbbbb"), bench.add("a")
        assert bench.step() == [(first, 0, 5)], "the small one does not overtake the big one"
        assert small.state is SequenceState.WAITING
        bench.run()
        bench.check_answers()

    def test_more_decodes_than_the_budget(self) -> None:
        bench = Bench(max_step_tokens=2, num_lanes=2)
        oldest = [bench.add("a"), bench.add("b"), bench.add("c")][:2]
        while bench.begin() is not None:
            pass
        for step in list(bench.in_flight):
            bench.end(step)
        assert [chunk[0] for chunk in bench.step()] == oldest
        bench.run()
        bench.check_answers()

    def test_stop_token(self) -> None:
        bench = Bench()
        sequence = bench.add("abc", max_tokens=30, stop_ids=(1,))
        bench.run()
        assert sequence.finish_reason is FinishReason.STOP
        assert sequence.output_ids[-1] == 1
        bench.check_answers()

    def test_the_context_ends_a_sequence(self) -> None:
        bench = Bench(context_length=8)
        sequence = bench.add("abcab", max_tokens=100)
        bench.run()
        assert sequence.finish_reason is FinishReason.LENGTH
        assert sequence.num_tokens == 8
        bench.check_answers()


class TestLimits:
    def test_what_can_never_be_served_is_refused(self) -> None:
        bench = Bench(num_pages=3, page_size=4, context_length=64)
        assert bench.scheduler.max_sequence_tokens == 13, "the last token needs no page"
        assert bench.scheduler.fits(13)
        assert not bench.scheduler.fits(14)
        with pytest.raises(InvalidRequest, match=r"stopping.max_tokens: is 9, .* room for 8"):
            bench.add("abcab", max_tokens=9)
        with pytest.raises(InvalidRequest, match=r"prompt: has 13 tokens, .* at most 12"):
            bench.add("a" * 13)
        with pytest.raises(InvalidRequest, match=r"prompt: has 64 tokens, the context allows at most 63"):
            bench.add("a" * 64)
        bench.add("abcab", max_tokens=8)
        bench.run()
        bench.check_answers()

    def test_max_tokens_beyond_the_context_is_fine(self) -> None:
        bench = Bench(num_pages=4, page_size=4, context_length=16)
        assert bench.scheduler.fits(10**9)
        bench.add("abc", max_tokens=10**9)

    @pytest.mark.parametrize("name", ["max_step_tokens", "max_running", "num_lanes", "max_chunk_tokens"])
    def test_settings_that_cannot_be(self, name: str) -> None:
        with pytest.raises(ConfigError, match=f"{name} is 0"):
            Bench(**{name: 0})
        with pytest.raises(ConfigError, match="admission_watermark is 1"):
            Bench(admission_watermark=1)


class TestPrefixCache:
    def test_the_second_request_computes_only_what_differs(self) -> None:
        bench = Bench()
        bench.add("aaaabbbbc", max_tokens=1)
        bench.step()
        second = bench.add("aaaabbbba", max_tokens=1)
        assert bench.step() == [(second, 8, 1)]
        assert second.num_cached_tokens == 8
        assert (bench.scheduler.prefix_queries_tokens, bench.scheduler.prefix_hits_tokens) == (18, 8)
        bench.check_answers()

    def test_one_token_is_always_left_to_compute(self) -> None:
        bench = Bench()
        bench.add("aaaabbbb", max_tokens=1)
        bench.step()
        second = bench.add("aaaabbbb", max_tokens=1)
        assert bench.step() == [(second, 4, 4)]

    def test_who_arrives_together_computes_a_prefix_once(self) -> None:
        bench = Bench(page_size=4)
        first, second, other = bench.add("abcabcabca"), bench.add("abcabcabcb"), bench.add("ba")
        assert bench.step() == [(first, 0, 10), (other, 0, 2)], "who waits for the prefix is overtaken"
        assert bench.step() == [(first, 10, 1), (other, 2, 1), (second, 8, 2)]
        assert second.num_cached_tokens == 8
        bench.run()
        bench.check_answers()

    def test_a_promise_ends_with_who_made_it(self) -> None:
        for end in ("cancelled", "failed", "scored"):
            bench = Bench(page_size=4)
            first = bench.add("abcabcabca", prompt_logprobs=0 if end == "scored" else None)
            step = bench.begin()
            second = bench.add("abcabcabcb")
            assert step is not None
            assert bench.begin() is None
            if end == "cancelled":
                bench.scheduler.cancel(first)
                bench.end(step)
            elif end == "failed":
                bench.fail(step)
                bench.scheduler.cancel(first)
            else:
                bench.end(step)
            assert bench.step()[-1] == (second, 0 if end == "failed" else 8, 10 if end == "failed" else 2)
            bench.run()
            bench.check_answers()

    def test_a_prompt_to_be_scored_is_computed_whole_until_it_is(self) -> None:
        bench = Bench(num_pages=6, page_size=4)
        bench.add("abcabcabc", max_tokens=1)
        bench.run()
        scored = bench.add("abcabcabc", prompt_logprobs=0)
        assert bench.step() == [(scored, 0, 9)]
        assert scored.num_cached_tokens == 0
        assert not scored.scores_prompt, "done: a recomputation may use the cache"
        bench.run()
        bench.check_answers()

    def test_a_prompt_alone(self) -> None:
        bench = Bench(page_size=4, max_step_tokens=4)
        scored = bench.add("abcabc", max_tokens=0)
        assert [bench.step() for _ in range(2)] == [[(scored, 0, 4)], [(scored, 4, 2)]]
        assert (scored.finish_reason, bench.received[scored], bench.ledger.num_used) == (FinishReason.LENGTH, [], 0)

    def test_output_is_cached_like_a_prompt(self) -> None:
        bench = Bench()
        first = bench.add("abc", max_tokens=6)
        bench.run()
        follow_up = bench.add([*first.all_ids, 0], max_tokens=1)
        bench.step()
        assert follow_up.num_cached_tokens == 8

    def test_a_page_is_not_shared_before_its_step_ends(self) -> None:
        bench = Bench(num_lanes=2)
        bench.add("aaaab")
        assert bench.begin() is not None
        second = bench.add("aaaac")
        assert bench.begin() is None, "it waits for the page, a lane stays free"
        bench.run()
        assert second.num_cached_tokens == 4
        bench.check_answers()

    def test_all_logits_means_all_positions(self) -> None:
        bench = Bench()
        bench.add("aaaabbbbc", max_tokens=1)
        bench.step()
        second = bench.add("aaaabbbbc", max_tokens=1, logits=True)
        assert bench.step() == [(second, 0, 9)]
        assert bench.scheduler.prefix_queries_tokens == 9

    def test_a_waiting_prompt_is_hashed_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        num_hashed = 0
        blake2b: Callable[..., object] = hashlib.blake2b

        def counting(*args: object, **options: object) -> object:
            nonlocal num_hashed
            num_hashed += 1
            return blake2b(*args, **options)

        bench = Bench(num_pages=8)
        bench.add("abcabcabcabcabcabcab", max_tokens=8)
        bench.step()
        bench.add("aaaaaaaabbbbbbbbcccccccc", max_tokens=1)
        monkeypatch.setattr(pages.hashlib, "blake2b", counting)
        for _ in range(3):
            step = bench.scheduler.schedule()
            assert step is not None
            bench.scheduler.complete(step, [0])
        assert num_hashed == 5, "five full pages before the last token, and none of the other request's twice"


class TestPreemption:
    def squeezed(self) -> tuple[Bench, Sequence, Sequence]:
        """Two sequences that together need more than the four pages there are."""
        bench = Bench(num_pages=4)
        return bench, bench.add("abca", max_tokens=8), bench.add("bbbb", max_tokens=8)

    def test_the_youngest_gives_way_and_is_recomputed(self) -> None:
        bench, old, young = self.squeezed()
        while not bench.scheduler.num_preemptions:
            bench.step()
            bench.scheduler.check()
        assert young.state is SequenceState.WAITING
        assert young.num_preemptions == 1
        assert old.state is SequenceState.RUNNING
        received = list(bench.received[young])
        assert received
        bench.run()
        assert bench.received[young][: len(received)] == received, "nothing is sent twice or taken back"
        assert old.num_preemptions == 0
        assert bench.scheduler.prefix_queries_tokens == 8, "the two prompts; recomputing is no query"
        bench.check_answers()

    def test_a_prefill_under_way_gives_way_too(self) -> None:
        bench = Bench(num_pages=4, max_chunk_tokens=4)
        old, young = bench.add("abca"), bench.add("bbbbbbbbb")
        assert bench.step() == [(old, 0, 4), (young, 0, 4)]
        assert bench.step() == [(old, 4, 1)]
        assert young.num_preemptions == 1
        bench.run()
        bench.check_answers()

    def test_who_was_preempted_goes_before_who_came_later(self) -> None:
        bench, _, young = self.squeezed()
        late = bench.add("c", max_tokens=8)
        while young.num_admissions < 2:
            bench.step()
        assert late.num_admissions == 0 or late.num_preemptions > 0
        bench.run()
        bench.check_answers()

    def test_a_sequence_in_flight_keeps_its_pages(self) -> None:
        bench = Bench(num_pages=4, num_lanes=2, min_lane_rows=1)
        bench.add("abca", max_tokens=12)
        bench.add("bbbb", max_tokens=12)
        bench.step()
        old, young = bench.received
        while old.num_tokens < 9:
            one, other = bench.begin(), bench.begin()
            assert one is not None
            assert other is not None
            if young.num_tokens < 8:
                bench.end(other)
            bench.end(one)
        assert (bench.ledger.num_available, young.in_flight) == (0, True)
        assert bench.begin() is None, "the older needs a third page, and sits out"
        assert bench.scheduler.num_preemptions == 0
        bench.end(other)
        bench.run()
        assert (old.num_preemptions, young.num_preemptions) == (0, 1)
        bench.check_answers()

    def test_admission_leaves_a_watermark(self) -> None:
        bench = Bench(num_pages=4, admission_watermark=0.25)
        bench.add("abca")
        waits = bench.add("bbbbbbbbb", max_tokens=2)
        bench.step()
        assert waits.state is SequenceState.WAITING, "three pages are free, one of them is for the other's decode"
        bench.run()
        bench.check_answers()

    def test_alone_it_may_use_every_page(self) -> None:
        bench = Bench(num_pages=4, admission_watermark=0.9)
        bench.add("a" * 15, max_tokens=2)
        bench.run()
        bench.check_answers()


class TestLanes:
    def decoding(self, num_sequences: int, num_lanes: int, min_lane_rows: int) -> Bench:
        bench = Bench(num_pages=64, num_lanes=num_lanes, min_lane_rows=min_lane_rows)
        for _ in range(num_sequences):
            bench.add("ab", max_tokens=20)
        bench.step()
        return bench

    def rows(self, bench: Bench) -> list[int]:
        """Starts as many steps as there are; returns their sizes."""
        sizes = []
        while (step := bench.begin()) is not None:
            sizes.append(step.num_tokens)
        return sizes

    @pytest.mark.parametrize(
        ("num_sequences", "num_lanes", "sizes"),
        [
            (8, 1, [8]),
            (8, 2, [4, 4]),
            (7, 2, [7]),
            (9, 2, [5, 4]),
            (12, 3, [4, 4, 4]),
            (11, 3, [6, 5]),
            (3, 4, [3]),
        ],
    )
    def test_decodes_are_split_if_each_lane_gets_enough(
        self, num_sequences: int, num_lanes: int, sizes: list[int]
    ) -> None:
        assert self.rows(self.decoding(num_sequences, num_lanes, min_lane_rows=4)) == sizes

    def test_lanes_stay_balanced(self) -> None:
        bench = self.decoding(8, 2, min_lane_rows=4)
        self.rows(bench)
        bench.end(bench.in_flight[0])
        assert self.rows(bench) == [4]

    def test_a_few_decodes_wait_to_join_the_others(self) -> None:
        bench = self.decoding(3, 2, min_lane_rows=4)
        assert self.rows(bench) == [3]
        decodes = bench.in_flight[0]
        bench.add("c", max_tokens=20)
        bench.add("cc", max_tokens=20)
        assert self.rows(bench) == [3], "prefill overlaps with decode"
        bench.end(bench.in_flight[1])
        assert self.rows(bench) == [], "two decodes alone would read all the weights again"
        bench.end(decodes)
        assert self.rows(bench) == [5]

    def test_one_step_per_lane(self) -> None:
        bench = Bench(num_lanes=2, max_step_tokens=2)
        for _ in range(4):
            bench.add("ab")
        assert self.rows(bench) == [2, 2]
        assert bench.scheduler.num_in_flight == 2


class TestTrouble:
    def test_a_failed_step_is_computed_again(self) -> None:
        bench = Bench()
        first, second = bench.add("abca", max_tokens=6), bench.add("bb", max_tokens=6)
        bench.step()
        step = bench.begin()
        assert step is not None
        bench.fail(step)
        bench.scheduler.check()
        assert (first.state, second.state) == (SequenceState.WAITING, SequenceState.WAITING)
        assert bench.ledger.num_used == 0
        late = bench.add("c")
        assert [chunk[0] for chunk in bench.step()] == [first, second, late]
        bench.run()
        assert bench.scheduler.num_preemptions == 0
        bench.check_answers()

    def test_cancelled_in_every_state(self) -> None:
        bench = Bench(max_running=2)
        flying, running, waiting = bench.add("abc"), bench.add("bb"), bench.add("c")
        bench.step()
        bench.scheduler.cancel(waiting)
        bench.scheduler.cancel(running)
        assert bench.ledger.num_used == 1, "freed at once"
        step = bench.begin()
        assert step is not None
        bench.scheduler.cancel(flying)
        bench.scheduler.check()
        assert bench.ledger.num_used == 1, "the step still writes there"
        bench.end(step)
        assert bench.ledger.num_used == 0
        bench.scheduler.cancel(flying)
        assert bench.run() == 0
        assert [len(tokens) for tokens in bench.received.values()] == [1, 1, 0]

    def test_cancelled_in_a_step_that_fails(self) -> None:
        bench = Bench()
        sequence = bench.add("abc")
        step = bench.begin()
        assert step is not None
        bench.scheduler.cancel(sequence)
        bench.fail(step)
        assert bench.run() == 0

    def test_a_lost_worker_gives_back_its_sequences(self) -> None:
        bench, other = Bench(max_running=2), Bench(page_size=2, num_pages=32)
        for prompt in ("abca", "bb", "c"):
            bench.add(prompt, max_tokens=6)
        bench.step()
        step = bench.begin()
        assert step is not None
        drained = bench.scheduler.drain_all()
        assert drained == list(bench.received), "oldest first"
        bench.scheduler.check()
        assert bench.ledger.num_free == 16
        for sequence in drained:
            other.scheduler.add(sequence)
        other.received = bench.received
        assert bench.scheduler.complete(step, [0, 0]) == [], "an answer from the dead is not heard"
        bench.scheduler.fail(step)
        other.run()
        other.check_answers()

    def test_the_next_worker_may_have_larger_pages(self) -> None:
        bench, other = Bench(page_size=2), Bench(page_size=4, max_running=1)
        bench.add("abcac")
        bench.add("abbbc")
        bench.step()
        for sequence in bench.scheduler.drain_all():
            other.scheduler.add(sequence)
        other.received = bench.received
        other.run()
        other.check_answers()


REQUESTS = st.fixed_dictionaries(
    {
        "prompt": st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=12)
        | st.sampled_from([3, 4, 5, 8, 9, 12]).map(lambda num_tokens: [0] * num_tokens),  # prefixes that meet
        "max_tokens": st.integers(0, 8),
        "min_tokens": st.sampled_from([0, 0, 1, 3]),
        "prompt_logprobs": st.sampled_from([None, None, None, 0]),
        "stop_ids": st.sampled_from([(), (), (2,)]),
        "logits": st.sampled_from([False, False, False, True]),
    }
)


class SchedulerMachine(RuleBasedStateMachine):
    """Requests, steps, failures and cancellations in any order; then the rest runs to its end."""

    @initialize(
        num_pages=st.integers(6, 14),
        page_size=st.sampled_from([1, 2, 4]),
        max_step_tokens=st.integers(1, 16),
        max_chunk_tokens=st.none() | st.integers(1, 6),
        max_running=st.integers(1, 6),
        num_lanes=st.integers(1, 3),
        min_lane_rows=st.integers(1, 3),
        admission_watermark=st.sampled_from([0.0, 0.1, 0.3]),
        context_length=st.sampled_from([10, 64]),
    )
    def start(self, **options: float) -> None:
        self.bench = Bench(**options)  # type: ignore[arg-type]

    @rule(request=REQUESTS)
    def add(self, request: dict[str, object]) -> None:
        try:
            self.bench.add(**request)  # type: ignore[arg-type]
        except InvalidRequest:
            request = {**request, "prompt": [0], "max_tokens": 5}
            self.bench.add(**request)  # type: ignore[arg-type]

    @rule()
    def schedule(self) -> None:
        step = self.bench.begin()
        if not self.bench.in_flight:
            scheduler = self.bench.scheduler
            assert step is None
            assert not scheduler.num_waiting + scheduler.num_running, "idle with work to do"

    @precondition(lambda self: self.bench.in_flight)
    @rule(data=st.data())
    def complete(self, data: st.DataObject) -> None:
        self.bench.end(data.draw(st.sampled_from(self.bench.in_flight)))

    @precondition(lambda self: self.bench.in_flight)
    @rule(data=st.data())
    def schedule_and_complete(self, data: st.DataObject) -> None:
        self.complete(data)
        self.schedule()

    @precondition(lambda self: self.bench.in_flight)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        self.bench.fail(data.draw(st.sampled_from(self.bench.in_flight)))

    @precondition(lambda self: self.bench.received)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.bench.scheduler.cancel(data.draw(st.sampled_from(list(self.bench.received))))

    @precondition(lambda self: len(self.bench.in_flight) > 1)
    @rule()
    def worker_restarts(self) -> None:
        bench = self.bench
        drained = bench.scheduler.drain_all()
        assert drained == [sequence for sequence in bench.received if not sequence.is_over]
        bench.worker.slots.clear()
        for sequence in drained:
            bench.scheduler.add(sequence)
        for step in bench.in_flight:
            bench.scheduler.fail(step)
        bench.in_flight.clear()

    @invariant()
    def holds_together(self) -> None:
        self.bench.scheduler.check()
        for sequence, tokens in self.bench.received.items():
            assert sequence.output_ids == tokens

    def teardown(self) -> None:
        if hasattr(self, "bench"):
            self.bench.run()
            self.bench.check_answers()


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
