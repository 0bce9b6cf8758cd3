"""What is run, and how it is measured: through the service, by the SDK, with the router's own legs.

A prefill is one prompt and one token, measured from the call to its answer. A decode is a batch of streams, measured
while all of them decode: from the moment all have begun until the first is about to end.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
import time

from benchmarks.step.work import StepShape
from grokmoe import AsyncClient, Status
from grokmoe.model_config import ModelConfig

LAST_TOKENS = 4
"""A decode is measured until the first stream has so many tokens left: the status takes a step or two to come."""


@dataclasses.dataclass(frozen=True)
class Load:
    """`batch` sequences at once, `prompt` tokens in, `new` tokens out; one token out: a prefill."""

    name: str
    batch: int
    prompt: int
    new: int

    @property
    def is_prefill(self) -> bool:
        """Whether the prompts are what is measured."""
        return self.new == 1

    @property
    def unit(self) -> str:
        """What the times are of."""
        return "prompt" if self.is_prefill else "step"

    def fits(self, config: ModelConfig) -> bool:
        """Whether the model's context is long enough."""
        return self.prompt + self.new < config.context_length

    def steps(self, config: ModelConfig, max_step_tokens: int, itemsize: int, num_workers: int) -> list[StepShape]:
        """The steps of one unit: chunks of the prompt, or a decode in the middle of the measured time."""
        if not self.is_prefill:
            chunks = [(self.prompt + self.new // 2, 1)] * self.batch
            return [StepShape(config, chunks, itemsize, num_workers)]
        starts = range(0, self.prompt, max_step_tokens)
        return [
            StepShape(config, [(start, min(max_step_tokens, self.prompt - start))], itemsize, num_workers)
            for start in starts
        ]


def loads(batches: list[int], prefills: list[int], prompt: int, new: int) -> list[Load]:
    """Prefills of one prompt, then decodes."""
    return [Load(f"prefill {length}", 1, length, 1) for length in prefills] + [
        Load(f"decode {batch}", batch, prompt, new) for batch in batches
    ]


@dataclasses.dataclass(frozen=True)
class Measured:
    """One run. seconds: of one unit. legs: seconds of one unit, by leg. num_steps: in the whole measured time."""

    seconds: float
    legs: dict[str, float]
    num_steps: int
    tokens_per_second: float


async def run(client: AsyncClient, load: Load, vocab_size: int, seed: int) -> Measured:
    """Runs a load once. Prompts are random, so no prefix is shared."""
    draw = random.Random(f"{load.name}-{seed}")
    prompts = [[draw.randrange(4, vocab_size) for _ in range(load.prompt)] for _ in range(load.batch)]
    return await (_prefill(client, load, prompts[0]) if load.is_prefill else _decode(client, load, prompts))


async def _prefill(client: AsyncClient, load: Load, prompt: list[int]) -> Measured:
    before = await client.status()
    begin = time.perf_counter()
    await client.generate(prompt, max_tokens=1, temperature=0, ignore_eos=True)
    seconds = time.perf_counter() - begin
    after = await client.status()
    return Measured(seconds, _legs(before, after, 1), after.steps - before.steps, load.prompt / seconds)


class _Meter:
    """Watches the streams of a decode. Every step gives each of them one token."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._num_begun = 0
        self.all_begun, self.nearly_over = asyncio.Event(), asyncio.Event()
        self._marks: list[tuple[int, float]] = []

    async def read(self, client: AsyncClient, prompt: list[int], is_first: bool) -> None:
        """One stream, to its end."""
        count = 0
        options = {"max_tokens": self._load.new, "temperature": 0.0, "ignore_eos": True}
        async for delta in client.stream(prompt, **options):  # type: ignore[arg-type]
            if not delta.token_ids:
                continue
            self._num_begun += count == 0
            count += len(delta.token_ids)
            if self._num_begun == self._load.batch:
                self.all_begun.set()
            if count >= self._load.new - LAST_TOKENS:
                self.nearly_over.set()
            if is_first and self.all_begun.is_set() and not self.nearly_over.is_set():
                self._marks.append((count, time.perf_counter()))

    @property
    def step_seconds(self) -> float:
        """Between two tokens of the first stream, on average, while all decoded."""
        if len(self._marks) < 2:
            raise ValueError(
                f"{self._load.name}: {self._load.new} tokens are too few for all streams to decode at once"
            )
        (first, begin), (last, end) = self._marks[0], self._marks[-1]
        return (end - begin) / (last - first)


async def _decode(client: AsyncClient, load: Load, prompts: list[list[int]]) -> Measured:
    meter = _Meter(load)
    async with asyncio.TaskGroup() as group:
        for index, prompt in enumerate(prompts):
            group.create_task(meter.read(client, prompt, index == 0))
        await meter.all_begun.wait()
        before = await client.status()
        await meter.nearly_over.wait()
        after = await client.status()
    num_steps, seconds = after.steps - before.steps, meter.step_seconds
    return Measured(seconds, _legs(before, after, num_steps), num_steps, load.batch / seconds)


def _legs(before: Status, after: Status, num_units: int) -> dict[str, float]:
    return {
        now.leg: (now.total_seconds - then.total_seconds) / num_units
        for now, then in zip(after.legs, before.legs, strict=True)
    }
