"""Workers in this process: function calls instead of messages. The fused process and most tests use these.

Roles never import one another, so the attention engine is known here by its shape only.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from grokmoe.adapter import AdapterInfo
from grokmoe.device_thread import DeviceThread
from grokmoe.errors import FailedPrecondition
from grokmoe.step_plan import StepPlan, StepResult
from router.legs import Legs
from router.placement import ExpertLayers, Pair, pairs_of, ranges_of
from router.transport.base import AttentionInfo, ExpertInfo, ExpertReply, Hole, Loaded

LOCAL = "local"


class StepRun(Protocol):
    """A step under way, see attention_worker.engine.StepRun."""

    stages_ns: Mapping[str, int]

    def advance(self, moe_TD: torch.Tensor | None) -> Any:
        """Goes to the next hole (has `layer` and `x_TD`) or to the end (a StepResult)."""

    def replay(self, fill: Callable[[int, torch.Tensor], torch.Tensor]) -> StepResult | None:
        """The whole step as one program, if there is one for it."""

    def close(self) -> None:
        """Drops the step."""


class AttentionEngine(Protocol):
    """What runs plans, see attention_worker.engine.AttentionEngine."""

    @property
    def device(self) -> DeviceThread:
        """The thread that computes."""

    def begin(self, plan: StepPlan) -> StepRun:
        """Validates a plan."""

    @property
    def adapters(self) -> AdapterStore | None:
        """Its adapters; None: it takes none."""


class AdapterStore(Protocol):
    """The adapters of a worker, see attention_worker.lora.store.AdapterStore."""

    @property
    def loaded(self) -> tuple[AdapterInfo, ...]:
        """Those that plans can name."""

    async def load(self, name: str) -> AdapterInfo:
        """Has one more."""

    def unload(self, adapter_id: str) -> bool:
        """Forgets one."""


class LocalAttentionLink:
    """An attention engine in this process."""

    address = LOCAL
    num_stages = 1

    def __init__(self, engine: AttentionEngine, info: AttentionInfo) -> None:
        self._engine, self._info = engine, info

    async def describe(self) -> AttentionInfo:
        """See AttentionLink."""
        store = self._engine.adapters
        return self._info if store is None else dataclasses.replace(self._info, adapters=store.loaded)

    async def load_adapter(self, name: str) -> AdapterInfo:
        """See AttentionLink."""
        return await self._adapters.load(name)

    async def unload_adapter(self, adapter_id: str) -> None:
        """See AttentionLink."""
        self._adapters.unload(adapter_id)

    @property
    def _adapters(self) -> AdapterStore:
        if self._engine.adapters is None:
            raise FailedPrecondition("this worker takes no adapters")
        return self._engine.adapters

    async def step(self, lane: int, plan: StepPlan, hole: Hole, legs: Legs) -> StepResult:
        """See AttentionLink. With local experts the whole step is one task of the device thread."""
        run = self._engine.begin(plan)
        device = self._engine.device
        try:
            if hole.is_local:
                return await device.run(drive, run, hole, legs)
            at = await device.run(_advance, run, None, legs)
            while not isinstance(at, StepResult):
                out_TD = await hole.fill(at.layer, at.x_TD)
                at = await device.run(_advance, run, out_TD, legs)
            return at
        except BaseException:
            device.post(run.close)
            raise

    async def close(self) -> None:
        """See AttentionLink."""


def _advance(run: StepRun, moe_TD: torch.Tensor | None, legs: Legs) -> Any:
    with legs.time("worker"):
        at = run.advance(moe_TD)
    if isinstance(at, StepResult):
        legs.split("worker", run.stages_ns)
    return at


def drive(run: StepRun, hole: Hole, legs: Legs) -> StepResult:
    """A whole step on the caller's thread, with holes that are filled there."""
    if hole.can_be_recorded:
        with legs.time("worker"):
            result = run.replay(hole.record)
        if result is not None:
            legs.split("worker", run.stages_ns)
            return result
    at = _advance(run, None, legs)
    while not isinstance(at, StepResult):
        at = _advance(run, hole.fill_now(at.layer, at.x_TD), legs)
    return at


class LocalExpertLink:
    """Experts in this process behind the link's interface, each with a thread of its own.

    The fused process does not need it (router.moe.LocalMoe calls its experts directly); it is the double that tests
    put in place of a remote worker.
    """

    def __init__(
        self,
        forward: Callable[[int, tuple[int, ...], tuple[int, ...], torch.Tensor], torch.Tensor],
        info: ExpertInfo,
        address: str = LOCAL,
    ) -> None:
        self.address = address
        self._forward, self._info = forward, info
        self._device = DeviceThread("local-experts")

    async def describe(self) -> ExpertInfo:
        """See ExpertLink."""
        return self._info

    async def forward(
        self,
        lane: int,
        layer: int,
        expert_ids: tuple[int, ...],
        counts: tuple[int, ...],
        rows_ND: torch.Tensor,
        timeout: float | None = None,
    ) -> ExpertReply:
        """See ExpertLink. A call that nobody waits for is computed all the same."""
        asked = time.perf_counter()

        def compute() -> ExpertReply:
            begin = time.perf_counter()
            out_ND = self._forward(layer, expert_ids, counts, rows_ND)
            return ExpertReply(out_ND, begin - asked, time.perf_counter() - begin)

        return await self._device.run(compute)

    async def load(self, config_hash: str, experts: Sequence[ExpertLayers], timeout: float) -> Loaded:
        """See ExpertLink. Only what it says of itself changes: the function knows all experts."""
        self._hold(pairs_of(self._info.experts) | pairs_of(experts))
        return Loaded(0, 0.0)

    async def unload(self, config_hash: str, experts: Sequence[ExpertLayers]) -> None:
        """See ExpertLink."""
        self._hold(pairs_of(self._info.experts) - pairs_of(experts))

    def _hold(self, pairs: set[Pair]) -> None:
        self._info = dataclasses.replace(self._info, experts=ranges_of(pairs), revision=self._info.revision + 1)

    def watch(self, on_end: Callable[[str], None]) -> None:
        """See ExpertLink. It never goes away."""

    def reset(self, lane: int) -> None:
        """See ExpertLink. A lane keeps nothing here."""

    async def close(self) -> None:
        """See ExpertLink."""
        await asyncio.get_running_loop().run_in_executor(None, self._device.stop)
