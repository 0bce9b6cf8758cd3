"""One attention worker as a member of the cluster: joining, asked whether it is well, lost, coming back.

What is done about each of these is the cell's business (router/cell/); here is only how it is noticed. States:
router/worker_state.py.
"""

from __future__ import annotations

import abc
import asyncio
import dataclasses
import logging

import torch

from grokmoe.channel import TIMEOUTS
from grokmoe.errors import ConfigError, GrokmoeError, Reason, Unavailable
from grokmoe.model_config import ModelConfig
from router.probing import Prober, ProbeSettings
from router.step_deadline import StepDeadlineSettings
from router.step_pace import StepPaceSettings
from router.transport.base import AttentionInfo, AttentionLink
from router.worker_state import WorkerEvent, WorkerState, after

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class CellSettings:
    """Named limits of the care for one attention worker, seconds unless said otherwise."""

    heartbeat: float = 0.5
    """Pause between two questions to a worker in use. They keep its lease, which ends a second after the last sign of
    life (attention_worker/lease.py), and find out that it is gone or about to end while there is nothing to compute."""
    heartbeat_timeout: float = 1.0
    """How long an answer may take. A worker's event loop does not compute, so it answers during a step."""
    max_misses: int = 2
    """Unanswered questions in a row after which it counts as hung, if another worker is in use: one alone may be a
    pause of this process."""
    restart_pause: float = 0.1
    """After a bug that ended a lane, so that one that comes back at once does not take the whole process."""
    alive_within: float = 0.15
    """A worker that has not answered a step in time, and answers a question so soon, has not hung: it is slow."""
    max_moves: int = 3
    """Times a sequence leaves a worker because it is slow. One that is always found on the slow side stays."""
    deadline: StepDeadlineSettings = dataclasses.field(default_factory=StepDeadlineSettings)
    pace: StepPaceSettings = dataclasses.field(default_factory=StepPaceSettings)
    probe: ProbeSettings = dataclasses.field(default_factory=ProbeSettings)


class AttentionMember(abc.ABC):
    """A worker's link, its last description and its state.

    info: None before it has joined. adapter_ids: the LoRA adapters that it has.
    """

    def __init__(
        self, index: int, link: AttentionLink, config: ModelConfig, dtype: torch.dtype, care: CellSettings
    ) -> None:
        self.index, self.link, self.care = index, link, care
        self.state = WorkerState.JOINING
        self.info: AttentionInfo | None = None
        self.adapter_ids: set[str] = set()
        self._config, self._dtype = config, dtype
        self._prober = Prober(self.connect, care.probe, lambda: None, self.name, self._is_dead)
        self._heart: asyncio.Task[None] | None = None
        self._num_misses = 0

    @property
    def name(self) -> str:
        """For logs and errors."""
        return f"attention worker {self.index} at {self.link.address}"

    async def connect(self) -> None:
        """Asks the worker what it is and takes it in, with empty pages and the adapters there are.

        Raises Unavailable when it cannot be reached yet, is about to end, or another router has it; ConfigError when it
        serves another model.
        """
        try:
            info = await asyncio.wait_for(self.link.describe(), TIMEOUTS.connect)
        except (Unavailable, TimeoutError):
            self._enter(WorkerEvent.FAILED)
            raise
        if info.config_hash != self._config.content_hash:
            raise ConfigError(
                f"{self.name} serves another model: config hash {info.config_hash}, "
                f"expected {self._config.content_hash}"
            )
        if info.dtype != self._dtype:
            raise ConfigError(f"{self.name} computes in {info.dtype}, expected {self._dtype}")
        if (info.layer_begin, info.layer_end) != (0, self._config.num_layers):
            last = self._config.num_layers - 1
            raise ConfigError(f"{self.name} holds layers {info.layer_begin}-{info.layer_end - 1}, not all of 0-{last}")
        if info.is_draining:
            raise Unavailable(f"{self.name} is about to end", reason=Reason.SHUTTING_DOWN)
        info = await self._bring_adapters(info)
        self._num_misses = 0
        self.adapter_ids = {adapter.id for adapter in info.adapters}
        self._adopt(info)
        if self._heart is None:
            self._heart = asyncio.create_task(self._beat(), name=f"heart {self.name}")

    def seek(self) -> None:
        """Begins to look for the worker, again and again, until `connect` goes well."""
        self._prober.start()

    async def leave(self) -> None:
        """Forgets the worker."""
        self._prober.stop()
        if self._heart is not None:
            self._heart.cancel()
            await asyncio.gather(self._heart, return_exceptions=True)
        await self.link.close()

    def _enter(self, event: WorkerEvent) -> None:
        self.state = after(self.state, event)

    def _is_dead(self) -> None:
        self._enter(WorkerEvent.AWAY)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self.care.heartbeat)
            if self.state is WorkerState.READY:
                await self._ask()

    async def _ask(self) -> None:
        """Asks a worker in use how it is."""
        known = self.info
        assert known is not None
        try:
            async with asyncio.timeout(self.care.heartbeat_timeout):
                found = await self.link.describe()
        except TimeoutError:
            self._num_misses += 1
            # Alone it is waited for: there is nobody to go to, and what it computes is not lost yet.
            if self._num_misses >= self.care.max_misses and self._has_other():
                self._lose(known, Unavailable(f"silent for {self._num_misses} questions"), is_hung=True)
        except GrokmoeError as error:
            self._doubt(known, error)
        except Exception:
            logger.exception("asking %s failed", self.name)
        else:
            self._num_misses = 0
            if found.incarnation != known.incarnation:
                self._lose(known, Unavailable("it has another incarnation", reason=Reason.WRONG_INCARNATION))
            elif found.is_draining:
                self.drain()

    @abc.abstractmethod
    async def _bring_adapters(self, info: AttentionInfo) -> AttentionInfo:
        """Before the worker is taken in, it gets the adapters there are. Raises Unavailable when it is lost."""

    @abc.abstractmethod
    def _has_other(self) -> bool:
        """Whether another worker is in use."""

    @abc.abstractmethod
    def _adopt(self, info: AttentionInfo) -> None:
        """The worker has described itself and fits."""

    @abc.abstractmethod
    def _doubt(self, info: AttentionInfo, error: GrokmoeError) -> None:
        """It cannot be asked any more. Steps in flight may go well all the same, as while it ends in order."""

    @abc.abstractmethod
    def _lose(self, info: AttentionInfo, error: GrokmoeError, is_hung: bool = False) -> None:
        """The worker that described itself as `info` is gone, or its pages are."""

    @abc.abstractmethod
    def drain(self) -> None:
        """The worker is to be given no more work."""
