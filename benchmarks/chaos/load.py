"""Clients that stream without a pause, and hold every token against the one of the undisturbed run."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import random
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from grokmoe import AsyncClient, FinishReason
from grokmoe.errors import GrokmoeError

STREAM_TIMEOUT = 120.0
"""Deadline of one stream, seconds. Who has not all its tokens by then has lost them."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A request that has one right answer. options: of `AsyncClient.stream`."""

    prompt: tuple[int, ...]
    options: dict[str, Any]


@dataclasses.dataclass
class Outcome:
    """What became of one stream. Times are monotonic seconds.

    arrivals: when each delta came. error: why it ended early; empty: it did not. changed_at: when a token came
    that is another than in the undisturbed run; None: never.
    """

    begin: float
    arrivals: list[float] = dataclasses.field(default_factory=list)
    end: float | None = None
    error: str = ""
    changed_at: float | None = None

    def waits(self, now: float) -> list[tuple[float, float]]:
        """(begin, end) of every wait between two deltas; of a live stream also the one that lasts."""
        times = [*self.arrivals, *([] if self.end is not None else [now])]
        return list(itertools.pairwise(times))

    def first_wait(self, now: float) -> tuple[float, float]:
        """(begin, end) of the wait for the first delta, the queue and the prompt's computation included."""
        return self.begin, self.arrivals[0] if self.arrivals else self.end or now


def make_jobs(num_jobs: int, vocab_size: int, seed: int, longest: int = 96) -> list[Job]:
    """Random prompts, so that no prefix is shared; every other job is drawn, with its own seed, the rest greedy."""
    draw = random.Random(seed)
    jobs = []
    for index in range(num_jobs):
        prompt = tuple(draw.randrange(4, vocab_size) for _ in range(draw.randint(4, 160)))
        options: dict[str, Any] = {"max_tokens": draw.randint(longest // 4, longest), "ignore_eos": True}
        options |= {"temperature": 0.0} if index % 2 else {"temperature": 0.9, "top_p": 0.95}
        jobs.append(Job(prompt, {**options, "seed": draw.randrange(1 << 32), "text": False}))
    return jobs


async def reference(client: AsyncClient, jobs: Sequence[Job]) -> list[tuple[int, ...]]:
    """The tokens of each job, computed one at a time on a cluster that nobody disturbs."""
    return [(await client.generate(job.prompt, timeout=STREAM_TIMEOUT, **job.options)).token_ids for job in jobs]


class Load:
    """`concurrency` clients in turn through the jobs, for as long as the `async with` block lasts; then they finish.

    outcomes: all streams, in the order of their beginning.
    """

    def __init__(
        self,
        client: AsyncClient,
        jobs: Sequence[Job],
        expected: Sequence[tuple[int, ...]],
        concurrency: int,
        resume: bool = False,
    ) -> None:
        """expected: the tokens of each job. resume: have the SDK take a stream that breaks up again."""
        self._client, self._jobs, self._expected, self._resume = client, jobs, expected, resume
        self._concurrency = concurrency
        self._is_over = False
        self._arrived = asyncio.Event()
        self._next = 0
        self._tasks: list[asyncio.Task[None]] = []
        self.outcomes: list[Outcome] = []

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._run()) for _ in range(self._concurrency)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            return
        await self.finish()

    async def finish(self) -> None:
        """Begins no more streams and returns when the live ones have ended."""
        self._is_over = True
        await asyncio.gather(*self._tasks)

    @property
    def live(self) -> list[Outcome]:
        """Streams that have brought something and have not ended."""
        return [outcome for outcome in self.outcomes if outcome.end is None and outcome.arrivals]

    async def wait_decoding(self, num_streams: int) -> None:
        """Returns when so many streams are in the middle of their answers."""
        while len(self.live) < num_streams:
            self._arrived.clear()
            await self._arrived.wait()

    async def _run(self) -> None:
        while not self._is_over:
            if (await self.run_one()).error:
                await asyncio.sleep(0.1)  # a server that refuses everything is not to be stormed

    async def run_one(self) -> Outcome:
        """The next job from beginning to end."""
        which, self._next = self._next % len(self._jobs), self._next + 1
        outcome = Outcome(time.monotonic())
        self.outcomes.append(outcome)
        await self._stream(self._jobs[which], self._expected[which], outcome)
        return outcome

    async def _stream(self, job: Job, expected: tuple[int, ...], outcome: Outcome) -> None:
        tokens: list[int] = []
        reason = None
        try:
            options = {"timeout": STREAM_TIMEOUT, "resume": self._resume, **job.options}
            async with self._client.stream(job.prompt, **options) as stream:
                async for delta in stream:
                    if delta.token_ids:
                        outcome.arrivals.append(time.monotonic())
                        self._arrived.set()
                    due = expected[len(tokens) : len(tokens) + len(delta.token_ids)]
                    if delta.token_ids != due and outcome.changed_at is None:
                        outcome.changed_at = time.monotonic()
                    tokens += delta.token_ids
                    reason = delta.finish_reason
            if reason is not FinishReason.LENGTH:
                outcome.error = f"finished for {reason}"
            elif len(tokens) != len(expected):
                outcome.error = f"{len(tokens)} tokens, {len(expected)} were due"
        except GrokmoeError as error:
            outcome.error = f"{type(error).__name__}: {error.message}"
        outcome.end = time.monotonic()
