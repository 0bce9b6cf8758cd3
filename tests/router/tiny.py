"""tiny-a in float32, taken apart: attention engines, its experts as a function, and an engine over any links."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import itertools
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any

import torch

from attention_worker.engine import AttentionEngine, AttentionEngineSettings
from attention_worker.weights import AttentionWeights, load_weights
from expert_worker import weights as expert_weights
from expert_worker.experts import ExpertSet
from grokmoe import tensor_names
from grokmoe.checkpoint import Checkpoint
from grokmoe.device_thread import DeviceThread
from grokmoe.errors import Unavailable
from grokmoe.expert_spec import parse_experts
from grokmoe.expert_units import FIRST_SLICE
from grokmoe.step_plan import StepPlan, StepResult
from grokmoe.telemetry import AttentionMetrics, RouterMetrics, new_registry
from launcher.serve import describe
from router.admission import AdmissionSettings
from router.cell import MakeHole
from router.engine import Engine, EngineSettings
from router.experts import ExpertPool, ExpertPoolSettings
from router.generation import Generation
from router.legs import Legs
from router.moe import Gates, LocalMoe, RemoteMoe, RowCounter
from router.request import Request, SamplingSettings
from router.step import SchedulerSettings
from router.transport.base import AttentionInfo, AttentionLink, ExpertInfo, ExpertLink, ExpertReply, Hole
from router.transport.local import LocalAttentionLink, LocalExpertLink
from tests import goldens

CONFIG = goldens.config()
DTYPE = torch.float32
PAGE_SIZE = 8
_NUMBERS = itertools.count()
TIMEOUT = 30.0
"""Seconds after which a wait counts as a hang."""


@functools.cache
def attention_weights(held: range) -> AttentionWeights:
    with Checkpoint.open(goldens.DIRECTORY) as checkpoint:
        return load_weights(checkpoint, DTYPE, torch.device("cpu"), held=held)


@functools.cache
def gates() -> Gates:
    with Checkpoint.open(goldens.DIRECTORY) as checkpoint:
        return Gates.from_weights(
            [checkpoint.read(tensor_names.gate(layer), DTYPE) for layer in range(CONFIG.num_layers)]
        )


@functools.cache
def expert_set() -> ExpertSet:
    with Checkpoint.open(goldens.DIRECTORY) as checkpoint:
        held = {layer: tuple(range(CONFIG.num_experts)) for layer in range(CONFIG.num_layers)}
        experts = ExpertSet(CONFIG, held, DTYPE, torch.device("cpu"))
        expert_weights.load(experts, checkpoint)
    return experts


@functools.cache
def sliced_set() -> ExpertSet:
    """All experts whole, in halves and in quarters."""
    with Checkpoint.open(goldens.DIRECTORY) as checkpoint:
        held = parse_experts("all+all:all/2+all:all/4", CONFIG.num_experts, CONFIG.num_layers)
        experts = ExpertSet(CONFIG, held, DTYPE, torch.device("cpu"))
        expert_weights.load(experts, checkpoint)
    return experts


def units(spec: str) -> tuple[int, ...]:
    """Of any layer, in the words of --experts."""
    return parse_experts(spec, CONFIG.num_experts, 1).get(0, ())


@functools.cache
def device() -> DeviceThread:
    """One for all attention engines: tests compute one thing at a time anyway."""
    thread = DeviceThread("test-attention")
    thread.call(torch.set_num_threads, 1)
    return thread


def attention_engine(
    num_pages: int = 64, max_step_tokens: int = 512, page_size: int = PAGE_SIZE, held: range = range(CONFIG.num_layers)
) -> AttentionEngine:
    """A worker just started: nothing in its cache, and an incarnation of its own. held: its layers."""
    sizes = AttentionEngineSettings(num_pages, page_size, max_step_tokens)
    return AttentionEngine(CONFIG, attention_weights(held), sizes, AttentionMetrics(new_registry()), device())


def attention_link(**sizes: Any) -> LocalAttentionLink:
    engine = attention_engine(**sizes)
    return LocalAttentionLink(engine, describe(engine))


class RestartingAttention:
    """A link to a worker that dies in the middle of the steps whose numbers are in `dies_at`, and is another then.

    returns: whether it comes back after that.
    """

    address = "restarting"
    num_stages = 1

    def __init__(self, dies_at: Iterable[int], returns: bool = True, **sizes: Any) -> None:
        self.num_steps = 0
        self.incarnations: list[str] = []
        self._dies_at, self._returns, self._sizes = set(dies_at), returns, sizes
        self._start()

    def _start(self) -> None:
        self._link: LocalAttentionLink | None = attention_link(**self._sizes)

    async def describe(self) -> AttentionInfo:
        if self._link is None:
            if not self._returns:
                raise Unavailable("gone")
            self._start()
            assert self._link is not None
        info = await self._link.describe()
        self.incarnations.append(info.incarnation)
        return info

    async def step(self, lane: int, plan: StepPlan, hole: Hole, legs: Legs) -> StepResult:
        if self._link is None:
            raise Unavailable("gone")
        number, self.num_steps = self.num_steps, self.num_steps + 1
        result = await self._link.step(lane, plan, hole, legs)
        if number in self._dies_at:  # computed, but the answer was lost
            self._link = None
            raise Unavailable("died")
        return result

    async def close(self) -> None: ...


def experts(layer: int, expert_ids: tuple[int, ...], counts: tuple[int, ...], rows_ND: torch.Tensor) -> torch.Tensor:
    held = sliced_set() if expert_ids[-1] >= FIRST_SLICE else expert_set()
    return held.forward(layer, expert_ids, counts, rows_ND)


def expert_info(held: Iterable[int] = range(8), **changes: Any) -> ExpertInfo:
    info = ExpertInfo(
        config_hash=CONFIG.content_hash,
        incarnation="one",
        dtype=DTYPE,
        experts=tuple((expert, 0, CONFIG.num_layers) for expert in held),
        max_rows=8192,
        device="cpu",
    )
    return dataclasses.replace(info, **changes)


class ExpertDouble(LocalExpertLink):
    """An expert worker that the test can take away. `calls`: (layer, expert ids) of every call it got.

    num_described: how often it was asked what it is.
    """

    def __init__(self, held: Iterable[int] = range(8), forward: Callable[..., torch.Tensor] = experts) -> None:
        self.info = expert_info(held)
        super().__init__(forward, self.info, f"double {sorted(held)}")
        self.is_up = True
        self.calls: list[tuple[int, tuple[int, ...]]] = []
        self.num_described = 0

    async def describe(self) -> ExpertInfo:
        self.num_described += 1
        if not self.is_up:
            raise Unavailable("away")
        return self.info

    async def forward(
        self,
        lane: int,
        layer: int,
        expert_ids: tuple[int, ...],
        counts: tuple[int, ...],
        rows_ND: torch.Tensor,
        timeout: float | None = None,
    ) -> ExpertReply:
        self.calls.append((layer, expert_ids))
        if not self.is_up:
            raise Unavailable("away")
        return await super().forward(lane, layer, expert_ids, counts, rows_ND, timeout)


@contextlib.asynccontextmanager
async def serving(
    attention: Sequence[AttentionLink] | AttentionLink,
    expert_links: Sequence[ExpertLink] | None = None,
    pool_settings: ExpertPoolSettings | None = None,
    admission: AdmissionSettings | None = None,
    faults: dict[str, Any] | None = None,
    **limits: Any,
) -> AsyncIterator[Engine]:
    """An engine that has started. Its books are checked at the end.

    expert_links: None for experts in this process. faults: more of EngineSettings. limits: of SchedulerSettings.
    """
    links = attention if isinstance(attention, Sequence) else [attention]
    counter, pool = RowCounter(CONFIG), None
    make_hole: MakeHole
    if expert_links is None:

        def make_hole(lane: int, legs: Legs, deadline: float | None) -> Hole:
            return LocalMoe(CONFIG, gates(), experts, counter, legs)

    else:
        remote = pool = ExpertPool(CONFIG, DTYPE, expert_links, None, pool_settings)

        def make_hole(lane: int, legs: Legs, deadline: float | None) -> Hole:
            return RemoteMoe(CONFIG, gates(), remote, counter, device(), lane, legs, deadline)

    settings = EngineSettings(
        SchedulerSettings(context_length=CONFIG.context_length, **{"min_lane_rows": 1, **limits}),
        admission or AdmissionSettings(),
        30.0,
        **(faults or {}),
    )
    engine = Engine(CONFIG, DTYPE, links, make_hole, pool, counter, settings, RouterMetrics(new_registry()))
    await engine.start()
    try:
        yield engine
        engine.check()
    finally:
        await engine.close()


def golden_request(prompt: str, max_tokens: int = 16, **changes: Any) -> Request:
    """Greedy, so that `goldens.greedy` is the answer."""
    greedy = SamplingSettings(temperature=0.0)
    request = Request(
        request_id=f"{prompt}-{next(_NUMBERS)}",
        prompt_ids=tuple(goldens.PROMPTS[prompt]),
        sampling=greedy,
        max_tokens=max_tokens,
    )
    return dataclasses.replace(request, **changes)


def golden_tokens(prompt: str) -> list[int]:
    return goldens.greedy("seed", prompt)


async def tokens_of(generation: Generation) -> list[int]:
    """All tokens of a generation with one candidate, to its end."""
    (tokens,) = await candidates_of(generation)
    return tokens


async def candidates_of(generation: Generation) -> list[list[int]]:
    """All tokens of every candidate."""
    tokens: list[list[int]] = [[] for _ in generation.sequences]
    num_live = len(tokens)
    async with asyncio.timeout(TIMEOUT):
        while num_live:
            for delivery in await generation.take():
                tokens[delivery.index] += delivery.token_ids
                num_live -= delivery.finish_reason is not None
    return tokens


async def until(condition: Callable[[], bool]) -> None:
    """Waits for a condition; fails if it takes too long."""
    async with asyncio.timeout(TIMEOUT):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.002)
