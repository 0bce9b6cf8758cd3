"""One message under way at a time, everything in order, and an end whatever happens."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grokmoe.errors import Cancelled, Unavailable
from grokmoe.v1 import generation_pb2 as pb
from router.answer import Answer, Part
from router.generation import NOBODY, Generation
from router.outbox import Outbox
from router.request import Request
from router.sequence import FinishReason, Sequence
from router.step import Drawn
from router.stream_writer import StreamWriter


class Client:
    """What a gRPC context is to a writer: takes a message when it is told to."""

    def __init__(self) -> None:
        self.taken: list[pb.StreamGenerateResponse] = []
        self.under_way: asyncio.Future[None] | None = None
        self.is_quick = False

    async def write(self, data: bytes) -> None:
        assert self.under_way is None, "two messages at a time"
        if not self.is_quick:
            self.under_way = asyncio.get_running_loop().create_future()
            await self.under_way
        self.taken.append(pb.StreamGenerateResponse.FromString(data))

    async def take(self) -> None:
        """Takes the message that is under way, if there is one."""
        if self.under_way is not None:
            self.under_way.set_result(None)
            self.under_way = None
        await settle()

    @property
    def token_ids(self) -> list[list[int]]:
        return [list(message.token_ids) for message in self.taken]


async def settle() -> None:
    """Lets the loop do all that can be done at once."""
    for _ in range(6):
        await asyncio.sleep(0)


class Stream:
    """A generation, its client, and the writer between them."""

    def __init__(self, n: int = 1) -> None:
        self.request = Request(request_id="mine", prompt_ids=(1, 2), n=n)
        self.sequences = [Sequence(self.request, (0.0, index), index) for index in range(n)]
        self.generation = Generation(self.request, NOBODY, self.sequences, lambda _: None)
        self.client = Client()
        self.made: list[Part] = []
        self.delays: list[float] = []
        answer = Answer(self.generation, None, None)
        self.writer = StreamWriter(
            self.client.write, self.generation, answer, Outbox(), self.made.append, self.delays.append
        )
        self.task = asyncio.create_task(self.writer.run())

    def draw(self, token_id: int, reason: FinishReason | None = None, index: int = 0) -> None:
        self.generation.put(Drawn(self.sequences[index], token_id, reason))


def test_a_quick_client_gets_every_token_at_once() -> None:
    async def main() -> None:
        stream = Stream()
        for token_id in (5, 6, 7):
            stream.draw(token_id, FinishReason.LENGTH if token_id == 7 else None)
            await settle()
            await stream.client.take()
        await stream.task
        assert stream.client.token_ids == [[5], [6], [7]]
        assert [message.usage.completion_tokens for message in stream.client.taken] == [1, 2, 3]
        assert stream.client.taken[-1].finish_reason == pb.FINISH_REASON_LENGTH
        assert [part.timing is not None for part in stream.made] == [False, False, True]
        assert len(stream.delays) == 3

    asyncio.run(main())


def test_a_write_that_need_not_wait() -> None:
    async def main() -> None:
        stream = Stream()
        stream.client.is_quick = True
        stream.draw(5)
        await settle()
        stream.draw(6, FinishReason.STOP)
        await stream.task
        assert stream.client.token_ids == [[5], [6]]

    asyncio.run(main())


def test_a_slow_client_gets_in_one_message_what_it_has_missed_and_costs_no_other_memory() -> None:
    async def main() -> None:
        stream = Stream()
        stream.draw(0)
        await settle()
        for token_id in range(1, 500):
            stream.draw(token_id)
            await settle()
        assert len(stream.made) == 1, "nothing is made ahead"
        assert len(stream.generation._deliveries) == 1
        await stream.client.take()
        stream.draw(500, FinishReason.LENGTH)
        await settle()
        await stream.client.take()
        await stream.client.take()
        await stream.task
        assert stream.client.token_ids == [[0], list(range(1, 500)), [500]]

    asyncio.run(main())


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), max_size=60))
@settings(max_examples=60, deadline=None)
def test_candidates_in_order_however_steps_and_client_interleave(events: list[tuple[int, bool]]) -> None:
    async def main() -> None:
        stream = Stream(n=3)
        drawn: list[list[int]] = [[], [], []]
        for number, (index, takes) in enumerate(events):
            stream.draw(number, index=index)
            drawn[index].append(number)
            await settle()
            if takes:
                await stream.client.take()
        for index in range(3):
            stream.draw(1000, FinishReason.STOP, index)
            drawn[index].append(1000)
        while not stream.task.done():
            await settle()
            await stream.client.take()
        await stream.task
        got: list[list[int]] = [[], [], []]
        for message in stream.client.taken:
            got[message.index] += message.token_ids
        assert got == drawn
        assert stream.client.taken[-1].usage.completion_tokens == len(events) + 3
        assert [message.HasField("timing") for message in stream.client.taken].count(True) == 1

    asyncio.run(main())


def test_tokens_that_were_there_before_it_began() -> None:
    async def main() -> None:
        stream = Stream()
        stream.draw(5, FinishReason.LENGTH)  # the task has not run yet
        await settle()
        await stream.client.take()
        await stream.task
        assert stream.client.token_ids == [[5]]

    asyncio.run(main())


def test_an_error_comes_after_the_tokens_before_it() -> None:
    async def main() -> None:
        stream = Stream()
        stream.draw(5)
        stream.generation.fail(Unavailable("the worker is gone"))
        await settle()
        assert not stream.task.done()
        await stream.client.take()
        with pytest.raises(Unavailable, match="the worker is gone"):
            await stream.task
        assert stream.client.token_ids == [[5]]

    asyncio.run(main())


@pytest.mark.parametrize("error", [RuntimeError("broken"), asyncio.CancelledError()])
def test_a_write_that_fails_ends_it(error: BaseException) -> None:
    async def main() -> None:
        stream = Stream()
        stream.draw(5)
        await settle()
        assert stream.client.under_way is not None
        stream.client.under_way.set_exception(error)
        with pytest.raises(Cancelled):
            await stream.task

    asyncio.run(main())


def test_a_caller_that_leaves_in_the_middle_of_a_write() -> None:
    async def main() -> None:
        stream = Stream()
        stream.draw(5)
        await settle()
        stream.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stream.task
        stream.draw(6)
        await stream.client.take()  # the write ends, and nothing comes of it
        assert stream.client.token_ids == [[5]]
        assert stream.client.under_way is None

    asyncio.run(main())


def test_collected_answers_are_waited_for_without_waking() -> None:
    async def main() -> None:
        request = Request(request_id="mine", prompt_ids=(1,), n=2)
        sequences = [Sequence(request, (0.0, index), index) for index in range(2)]
        generation = Generation(request, NOBODY, sequences, lambda _: None)
        told: list[Any] = []
        generation.listen(lambda: told.append(None))
        generation.wait_for_end()
        for index in range(2):
            for token_id in range(3):
                assert told == []
                reason = FinishReason.STOP if token_id == 2 else None
                generation.put(Drawn(sequences[index], token_id, reason))
        assert len(told) == 1
        assert [delivery.token_ids for delivery in generation.take_now()] == [[0, 1, 2], [0, 1, 2]]

    asyncio.run(main())
