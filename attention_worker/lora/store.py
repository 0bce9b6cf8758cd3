"""The adapters that a worker has loaded, and loading one more while it serves.

What is loaded is decided on the event loop. Reading and packing are tasks of one thread of their own, so that steps go
on; a step keeps what it uses, so an adapter that is unloaded is freed when the last step with it has ended.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time

import torch

from attention_worker.lora.adapter import Adapter, Base, build_adapter, describe
from attention_worker.lora.files import read_adapter
from attention_worker.lora.sources import AdapterSources
from grokmoe.adapter import AdapterInfo
from grokmoe.device_thread import DeviceThread
from grokmoe.errors import CheckpointError, FailedPrecondition, Reason, ResourceExhausted
from grokmoe.telemetry import AttentionMetrics

logger = logging.getLogger(__name__)


class AdapterStore:
    """Adapters by id. `load` and `unload` on one event loop; `find` anywhere."""

    def __init__(
        self,
        base: Base,
        sources: AdapterSources,
        max_bytes: int,
        metrics: AttentionMetrics,
        device: DeviceThread,
    ) -> None:
        """max_bytes: of all adapters' weights together. device: the thread that computes."""
        self._base, self._sources, self._max_bytes, self._metrics = base, sources, max_bytes, metrics
        # A linear is packed by the thread that computes (PackedLinear).
        self._base_elsewhere = dataclasses.replace(base, make_linear=lambda w: device.call(base.make_linear, w))
        self._by_id: dict[str, Adapter] = {}
        self._turn = asyncio.Lock()
        self._thread: DeviceThread | None = None

    @property
    def loaded(self) -> tuple[AdapterInfo, ...]:
        """Those that steps can use, in the order in which they came."""
        return tuple(adapter.info for adapter in self._by_id.values())

    def find(self, adapter_id: str) -> Adapter:
        """The adapter of that id. Raises FailedPrecondition when it is not loaded."""
        adapter = self._by_id.get(adapter_id)
        if adapter is None:
            raise FailedPrecondition(f"adapter {adapter_id} is not loaded here", reason=Reason.ADAPTER_NOT_LOADED)
        return adapter

    def load_named(self) -> None:
        """Loads those that the operator has named, on the thread that computes. Raises StartupError."""
        for name in self._sources.named:
            try:
                adapter = build_adapter(name, read_adapter(name, self._sources.find(name)), self._base)
                self._check_room(adapter)
            except (CheckpointError, ResourceExhausted) as error:
                raise CheckpointError(f"adapter {name}: {error.message}") from error
            self._add(adapter)

    async def load(self, name: str) -> AdapterInfo:
        """Reads the adapter of that name, and has it from now on; one that is here already is not loaded twice.

        What was loaded under the name before stays, under its own id. Raises InvalidRequest, NotFound,
        FailedPrecondition (ADAPTER_REFUSED) saying what is wrong with its files, ResourceExhausted (NO_ROOM).
        """
        directory = self._sources.find(name)
        async with self._turn:
            begin = time.monotonic()
            if self._thread is None:
                self._thread = DeviceThread("adapter-loader")
                self._thread.post(lambda: torch.set_num_threads(1))  # a team of its own would fight with the device's
            try:
                stored = await self._thread.run(read_adapter, name, directory)
                if stored.id not in self._by_id:
                    adapter = await self._thread.run(build_adapter, name, stored, self._base_elsewhere)
                    self._check_room(adapter)
                    self._add(adapter)
                    logger.info("loaded in %.2f s: %s", time.monotonic() - begin, describe(adapter))
            except CheckpointError as error:
                logger.warning("adapter %s is refused: %s", name, error.message)
                raise FailedPrecondition(f"adapter {name}: {error.message}", reason=Reason.ADAPTER_REFUSED) from error
            return self._by_id[stored.id].info

    def unload(self, adapter_id: str) -> bool:
        """Forgets an adapter; steps that have begun end with it. False: it was not there."""
        adapter = self._by_id.pop(adapter_id, None)
        self._count()
        if adapter is not None:
            logger.info("unloaded adapter %s", adapter.info.name)
        return adapter is not None

    def close(self) -> None:
        """Ends the thread."""
        if self._thread is not None:
            self._thread.stop()

    def _add(self, adapter: Adapter) -> None:
        self._by_id[adapter.info.id] = adapter
        self._count()

    def _count(self) -> None:
        self._metrics.adapters.set(len(self._by_id))
        self._metrics.adapter_bytes.set(sum(info.num_bytes for info in self.loaded))

    def _check_room(self, adapter: Adapter) -> None:
        needed, used = adapter.info.num_bytes, sum(info.num_bytes for info in self.loaded)
        if used + needed > self._max_bytes:
            raise ResourceExhausted(
                f"adapter {adapter.info.name} takes {needed} bytes, {max(0, self._max_bytes - used)} of "
                f"{self._max_bytes} are free: unload another, or start the worker with more --lora-gib",
                reason=Reason.NO_ROOM,
            )
