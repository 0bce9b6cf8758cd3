"""The load: as many streams as it says, none too short, and the metrics of what was heard."""

from __future__ import annotations

import asyncio
import itertools
import types
from collections.abc import AsyncIterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.peers import streams
from benchmarks.peers.child import PeerFailed
from benchmarks.peers.streams import Heard, Prompts, gaps, percentile
from benchmarks.peers.workload import Workload

SMALL = Workload(prefills=(20,), batches=(1, 3), prompt=6, new=4, repeats=2, clients=(2, 5), requests=3, long_prompt=30)


class Server:
    """Answers in pieces of two tokens, and remembers what it was asked and how many streams it had at once."""

    def __init__(self, short_by: int = 0) -> None:
        self.asked: list[tuple[tuple[int, ...], int]] = []
        self.open = self.most_open = 0
        self._short_by = short_by

    async def ask(self, prompt: Sequence[int], new: int) -> AsyncIterator[int]:
        self.asked.append((tuple(prompt), new))
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            left = new - self._short_by
            while left > 0:
                await asyncio.sleep(0)
                yield min(2, left)
                left -= 2
        finally:
            self.open -= 1


def prompts() -> Prompts:
    return Prompts(1000, seed=1)


def test_loads_are_of_the_sizes_that_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()  # a second passes between two looks, so that more tokens take longer
    monkeypatch.setattr(streams, "time", types.SimpleNamespace(perf_counter=lambda: float(next(clock))))
    server = Server()
    found = asyncio.run(streams.loads(server.ask, prompts(), SMALL))
    assert found.keys() == {"prefill 20", "decode 1", "decode 3"}
    assert all(value > 0 for value in found.values())
    sizes = [(len(prompt), new) for prompt, new in server.asked]
    runs = SMALL.repeats + 1
    assert sizes.count((20, 1)) == runs
    assert sizes.count((6, 1)) == sizes.count((6, 5)) == runs * (1 + 3)
    assert server.most_open == 3


def test_a_difference_that_says_nothing_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(1)  # ever faster: what comes later takes less time
    monkeypatch.setattr(streams, "time", types.SimpleNamespace(perf_counter=lambda: -(2.0 ** -next(clock))))
    found = asyncio.run(streams.loads(Server().ask, prompts(), SMALL))
    assert found.keys() == {"prefill 20"}


def test_no_prompt_is_sent_twice() -> None:
    server = Server()
    asyncio.run(streams.loads(server.ask, prompts(), SMALL))
    asyncio.run(streams.serving(server.ask, prompts=Prompts(1000, seed=2), workload=SMALL))
    assert len({prompt for prompt, _ in server.asked}) == len(server.asked)
    assert all(300 <= token < 1000 for prompt, _ in server.asked for token in prompt)


def test_clients_ask_one_after_another() -> None:
    server = Server()
    seconds, heard = asyncio.run(streams.closed_loop(server.ask, prompts(), SMALL, 5))
    assert len(heard) == len(server.asked) == 5 * 3
    assert server.most_open == 5
    assert all(each.num_tokens == 4 and len(each.arrivals) == 2 for each in heard)
    assert all(each.begin <= each.arrivals[0] <= each.arrivals[1] for each in heard)
    assert seconds > 0


def test_serving_tells_every_metric_of_every_number_of_clients() -> None:
    found = asyncio.run(streams.serving(Server().ask, prompts(), SMALL))
    found |= asyncio.run(streams.serving_beside(Server().ask, prompts(), SMALL))
    assert list(found) == [metric.name for metric in SMALL.metrics()[3:]]


def test_long_prompts_arrive_beside_the_clients_and_leave_with_them() -> None:
    server = Server()
    asyncio.run(streams.serving_beside(server.ask, prompts(), SMALL))
    assert (30, 1) in {(len(prompt), new) for prompt, new in server.asked}
    assert server.open == 0


def test_a_stream_that_is_too_short_is_no_result() -> None:
    with pytest.raises(PeerFailed, match="a stream of 4 tokens had 3"):
        asyncio.run(streams.closed_loop(Server(short_by=1).ask, prompts(), SMALL, 1))


def test_a_failure_ends_all_streams() -> None:
    class Faulty(Server):
        """Fails at the first prompt of this length, when the others are in the middle of theirs."""

        fatal = 6

        async def ask(self, prompt: Sequence[int], new: int) -> AsyncIterator[int]:
            async for count in super().ask(prompt, new):
                if len(prompt) == self.fatal:
                    self.fatal = 0
                    raise PeerFailed("out of slots")
                yield count

    for fatal in (SMALL.prompt, SMALL.long_prompt):
        server = Faulty()
        server.fatal = fatal
        with pytest.raises(PeerFailed, match="out of slots"):
            asyncio.run(streams.serving_beside(server.ask, prompts(), SMALL))
        assert server.open == 0


def test_gaps_are_within_a_stream() -> None:
    heard = [Heard(0.0, (1.0, 1.5, 4.0), 3), Heard(0.0, (9.0,), 1), Heard(0.0, (), 0)]
    assert gaps(heard) == [0.5, 2.5]


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0.01, 1.0))
def test_a_percentile_is_the_smallest_value_that_enough_do_not_exceed(values: list[float], share: float) -> None:
    found = percentile(values, share)
    assert found in values
    assert sum(value <= found for value in values) >= share * len(values) - 1e-6
    smaller = [value for value in values if value < found]
    assert len(smaller) < share * len(values)


def test_percentiles_of_known_values() -> None:
    assert [percentile(range(1, 101), share) for share in (0.01, 0.5, 0.99, 1.0)] == [1, 50, 99, 100]
    assert percentile([], 0.99) == 0.0


def test_prompts_are_functions_of_the_seed() -> None:
    one, again, other = (Prompts(1000, seed) for seed in (1, 1, 2))
    assert one.next(50) == again.next(50) != other.next(50)
    assert len(set(itertools.chain(one.next(500)))) > 250
