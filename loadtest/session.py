"""One server under test: asked what it is, warmed up, and loaded, one plan at a time."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import secrets
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console

from grokmoe import AsyncClient, ClientOptions, GrokmoeError, ModelInfo
from loadtest.arrivals import gamma_times
from loadtest.crew import Crew
from loadtest.fault import ClusterState, Fault, disturb
from loadtest.job import Job
from loadtest.planned import PlannedRequest, plan_requests
from loadtest.progress import progress
from loadtest.record import RequestRecord
from loadtest.scrape import Reading, Scraper
from loadtest.settings import LoadSettings
from loadtest.source import Source, times

WARM_UP_CONCURRENCY = 4
"""Warm-ups under way at once: enough that a batch of several sequences has been seen once."""

IDLE_SECONDS = 30.0
"""How long to wait for the server to have nothing to do before a run."""

IDLE_POLL = 0.1


@dataclasses.dataclass(frozen=True)
class Run:
    """What one plan brought. begin: on the monotonic clock. faults: when each was done, seconds of the run."""

    plan: tuple[PlannedRequest, ...]
    records: tuple[RequestRecord, ...]
    begin: float
    readings: dict[str, list[Reading]]
    faults: tuple[float, ...] = ()


class Session:
    """Use as an async context manager. Raises GrokmoeError: the server cannot be reached, or is not what it must be."""

    def __init__(
        self,
        settings: LoadSettings,
        address: str,
        options: ClientOptions,
        console: Console,
        state: ClusterState | None = None,
    ) -> None:
        """state: whose processes faults are for, and whose metrics are read."""
        self.settings, self._address, self._console = settings, address, console
        self._state = state
        self._options: ClientOptions = {**options, "timeout": settings.timeout, "retries": settings.retries}
        self._stack = contextlib.AsyncExitStack()
        self._prefix = settings.request_id_prefix
        self.model: ModelInfo
        self.source: Source

    async def __aenter__(self) -> Self:
        try:
            self._client = await self._stack.enter_async_context(AsyncClient(self._address, **self._options))
            await self._client.wait_ready(max(self.settings.ready_check_timeout_sec, 1e-3))
            self.model = await self._client.model()
            self.source = Source(self.settings, self.model.vocab_size, self.model.context_length, self._count_tokens)
            crew = Crew(self._job(self.settings.max_concurrency), self.settings.processes)
            self._crew = await self._stack.enter_async_context(crew)
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    def _job(self, concurrency: int | None) -> Job:
        return Job(
            self._address,
            self._options,
            self.settings.sampling(),
            self._prefix if self._prefix is not None else f"loadtest-{secrets.token_hex(4)}-",
            concurrency,
            self.settings.drain_seconds,
        )

    async def _count_tokens(self, text: str) -> int:
        return len((await self._client.tokenize(text)).token_ids)

    async def warm_up(self) -> None:
        """Requests that nobody measures: connections, caches, kernels that are built at their first call."""
        s = self.settings
        if not s.num_warmups:
            return
        inputs = await self.source.inputs(s.num_warmups, s.seed + 1_000_003)
        turns = asyncio.Semaphore(WARM_UP_CONCURRENCY)
        options: dict[str, Any] = s.sampling()

        async def ask(prompt: str | tuple[int, ...], max_tokens: int) -> None:
            async with turns:
                await self._client.generate(prompt, max_tokens=max_tokens, **options)

        with self._console.status(f"warming up, {s.num_warmups} requests"):
            await asyncio.gather(*(ask(each.prompt, each.max_tokens) for each in inputs))

    async def plan(self, seed: int, num: int | None = None, rate: float | None = None) -> list[PlannedRequest]:
        """The whole schedule. num, rate: of a sweep's step, else as the settings say."""
        inputs = await self.source.inputs(num or self.settings.num_prompts, seed)
        when = times(self.settings, inputs, seed, rate)
        return plan_requests(inputs, when, self.settings.cancel_share, seed)

    async def closed_loop_rate(self, concurrency: int, num: int, seed: int) -> float:
        """Requests/s that so many clients in turn complete; 0 if none does."""
        inputs = await self.source.inputs(num, seed)
        plan = plan_requests(inputs, gamma_times(num, math.inf, 1.0, seed))
        async with Crew(self._job(concurrency), self.settings.processes) as crew:
            records = await crew.run(plan, True)
        ended = sorted(record.end for record in records if record.arrivals)
        return len(ended) / ended[-1] if ended else 0.0

    async def run(self, plan: Sequence[PlannedRequest], title: str, faults: Sequence[Fault] = ()) -> Run:
        """Sends a plan to a server that has nothing else to do."""
        await self._wait_idle()
        started = asyncio.get_running_loop().create_future()
        is_closed = self.settings.max_concurrency is not None and all(planned.at == 0 for planned in plan)
        others = () if self._state is None else self._state.metrics
        scraper = Scraper(self.settings.metrics_url, self.settings.metrics_interval, others)
        async with scraper, asyncio.TaskGroup() as group:
            with progress(self._console, title, len(plan), self.settings.progress) as show:
                sending = group.create_task(self._crew.run(plan, is_closed, show, started.set_result))
                await asyncio.wait((started, sending), return_when=asyncio.FIRST_COMPLETED)
                begin = started.result() if started.done() else 0.0
                disturbing = [group.create_task(self._disturb(fault, begin)) for fault in faults]
                records = await sending
        return Run(tuple(plan), tuple(records), begin, scraper.readings, tuple(task.result() for task in disturbing))

    async def _disturb(self, fault: Fault, begin: float) -> float:
        assert self._state is not None, "settings have checked it"
        return await disturb(fault, self._state, begin)

    async def _wait_idle(self) -> None:
        """What a run before has left behind is not to count for this one. A server that does not say is taken as is."""
        with contextlib.suppress(GrokmoeError, TimeoutError):
            async with asyncio.timeout(IDLE_SECONDS):
                while (status := await self._client.status()).waiting + status.running:  # noqa: ASYNC110 - no event
                    await asyncio.sleep(IDLE_POLL)
