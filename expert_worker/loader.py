"""Loads experts and gives them up while the worker serves.

All decisions fall on the event loop, in `Holdings`. Reading, laying out and freeing are tasks of one thread of their
own, a layer at a time, so that the device goes on with its calls and a long load does not hold up what is to be freed.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import threading
import time
import traceback
from collections.abc import Callable, Coroutine
from typing import Any

import torch

from expert_worker import weights
from expert_worker.cells import Cells, by_layer
from expert_worker.experts import ExpertSet
from expert_worker.layer import Layer
from expert_worker.matrix import Matrix
from expert_worker.room import free_bytes, give_back, is_out_of_memory
from grokmoe.checkpoint import Checkpoint
from grokmoe.device_thread import DeviceThread
from grokmoe.errors import (
    Cancelled,
    CheckpointError,
    FailedPrecondition,
    GrokmoeError,
    Reason,
    ResourceExhausted,
    Unavailable,
)
from grokmoe.expert_ranges import ranges_of
from grokmoe.expert_spec import describe_ranges, describe_units
from grokmoe.telemetry import ExpertMetrics
from grokmoe.tensor_names import ExpertLinear

logger = logging.getLogger(__name__)

UNLOAD_LINGER = 5.0
"""Seconds that experts are served after they were given up. A router that did not ask for it learns of it from the
next answer, whose revision is new to it, and asks what is held: that call may take 5 s (docs/protocol.md)."""

FREE_RETRY = 1.0
"""Seconds until another try when there is no memory even for freeing: stacked weights are freed by copying the rest."""


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What a load did: bytes that were read for it, its nanoseconds, and the revision that has it."""

    num_bytes: int
    load_ns: int
    revision: int


class ExpertLoader:
    """Changes what one worker holds. To be used on one event loop; `close` at the end."""

    def __init__(
        self,
        experts: ExpertSet,
        checkpoint: Checkpoint,
        device: DeviceThread,
        metrics: ExpertMetrics | None = None,
        linger: float = UNLOAD_LINGER,
        room: Callable[[torch.device], int] = free_bytes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """checkpoint: stays open as long as this is used. device: the thread that computes. linger: see UNLOAD_LINGER.

        room: bytes that are free on a device. clock: in seconds.
        """
        self._experts, self._checkpoint, self._device = experts, checkpoint, device
        self._linger, self._room, self._clock = linger, room, clock
        self._metrics = metrics
        if metrics is not None:
            for state in ("held", "loading", "lingering"):
                metrics.held.labels(state).set_function(lambda state=state: len(getattr(experts.holdings, state)))
        self._thread = DeviceThread("expert-loader")
        self._thread.post(lambda: torch.set_num_threads(1))  # a team of its own would fight with the device's
        self._turn = asyncio.Lock()
        self._changed = asyncio.Event()
        self._stops: set[threading.Event] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._is_draining = False

    async def load(self, wanted: Cells) -> Loaded:
        """Holds `wanted`, too, from now on; returns when all of it can be called and is described.

        One at a time. When the caller is cancelled the load ends, and nothing of it stays. Raises ResourceExhausted
        (NO_ROOM), FailedPrecondition for a checkpoint that cannot be read, Unavailable when the worker drains.
        """
        stop = threading.Event()
        self._stops.add(stop)
        task = self._start(self._load_in_turn(wanted, stop))
        task.add_done_callback(lambda _: self._stops.discard(stop))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            self._stop(stop)
            raise

    def unload(self, unwanted: Cells) -> int:
        """Gives up what is held of `unwanted`. Returns the revision."""
        holdings = self._experts.holdings
        holdings.give_up(unwanted, self._clock() + self._linger)
        self._arm()
        return holdings.revision

    def drain(self) -> None:
        """Ends what is being loaded, and refuses to load more."""
        self._is_draining = True
        for stop in set(self._stops):
            self._stop(stop)

    def close(self) -> None:
        """Ends everything. After the last call, before the device's thread ends, and also without a running loop."""
        self._is_draining = True
        for stop in set(self._stops):
            stop.set()
        if self._timer is not None:
            self._timer.cancel()
        self._thread.stop()

    def _start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # looked at: whoever waited for it may be gone

    def _stop(self, stop: threading.Event) -> None:
        stop.set()
        self._changed.set()

    def _check_wanted(self, stop: threading.Event) -> None:
        if self._is_draining:
            raise _draining()
        if stop.is_set():
            raise Cancelled("the caller is gone")

    async def _load_in_turn(self, wanted: Cells, stop: threading.Event) -> Loaded:
        async with self._turn:
            began = time.monotonic_ns()
            holdings = self._experts.holdings
            self._check_wanted(stop)
            while holdings.must_wait(wanted):
                self._changed.clear()
                await self._changed.wait()
                self._check_wanted(stop)
            missing = holdings.begin_load(wanted)
            try:
                await self._read(missing, stop)
            except BaseException as error:
                self._start(self._free(holdings.abandon_load()))
                self._arm()
                told = self._told(error, stop)
                self._count(_outcome(told))
                raise told from error
            holdings.finish_load()
            loaded = Loaded(self._experts.bytes_of(missing), time.monotonic_ns() - began, holdings.revision)
            self._count("ok", loaded.load_ns / 1e9)
            if missing:
                logger.info("loaded %s in %.1f s", describe_ranges(ranges_of(missing)), loaded.load_ns / 1e9)
            return loaded

    def _count(self, outcome: str, seconds: float | None = None) -> None:
        if self._metrics is not None:
            self._metrics.loads.labels(outcome).inc()
            if seconds is not None:
                self._metrics.load_time.observe(seconds)

    def _told(self, error: BaseException, stop: threading.Event) -> BaseException:
        """What the caller of a load that has failed is told."""
        if isinstance(error, Cancelled) and self._is_draining:
            return _draining()
        if is_out_of_memory(error):
            logger.warning("no memory for what was to be loaded: %s", error)
            return ResourceExhausted("there is no memory for these experts", reason=Reason.NO_ROOM)
        if isinstance(error, (CheckpointError, OSError)):
            logger.error("experts cannot be loaded: %s", error)
            return FailedPrecondition("the worker's checkpoint cannot be read; its log has the rest")
        return error

    async def _read(self, missing: Cells, stop: threading.Event) -> None:
        """Brings the weights into the layers and computes once with each, so that its first caller need not wait."""
        self._check_room(missing)
        for layer, expert_ids in by_layer(missing).items():
            await self._thread.run(self._load_layer, layer, expert_ids, stop)
            for expert in expert_ids:
                if stop.is_set():
                    raise Cancelled("stopped while loading")
                await self._device.run(self._warm_up, layer, expert)

    def _check_room(self, missing: Cells) -> None:
        """Most systems promise memory that they do not have and end the process that uses it: better to ask first."""
        if not missing:
            return
        experts = self._experts
        needed = experts.bytes_of(missing) + experts.most_at_once(missing)
        if experts.device.type != "cpu":  # all of a layer is copied
            needed += max(
                experts.bytes_of((layer, unit) for unit in experts.layers[layer].expert_ids)
                for layer in by_layer(missing)
            )
        room = self._room(experts.device)
        if needed > room:
            raise ResourceExhausted(f"{needed} bytes are needed, {room} are free", reason=Reason.NO_ROOM)

    def _load_layer(self, layer: int, expert_ids: tuple[int, ...], stop: threading.Event) -> None:
        """On the loader's thread."""
        put = self._put_on_device if self._experts.deterministic else weights.put_here
        try:
            weights.load_layer(self._experts, self._checkpoint, layer, expert_ids, stop.is_set, put)
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # what is half loaded would live as long as the error does
            raise

    def _put_on_device(self, layer: Layer, expert: int, linear: ExpertLinear, matrix: Matrix) -> None:
        """A deterministic linear must be made by the thread that computes (PackedLinear): calls wait while it lays out
        one matrix, though not while it is read."""
        self._device.call(layer.fill, expert, linear, matrix.in_memory())

    def _warm_up(self, layer: int, expert: int) -> None:
        """On the device's thread, between calls."""
        row_ND = torch.zeros(1, self._experts.config.hidden_size, dtype=self._experts.dtype)
        self._experts.forward(layer, (expert,), (1,), row_ND)

    def _arm(self) -> None:
        """Sets the timer for the next cell whose time is up."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        at = self._experts.holdings.next_expiry()
        if at is not None:
            self._timer = asyncio.get_running_loop().call_later(max(0.0, at - self._clock()), self._expire)

    def _expire(self) -> None:
        due = self._experts.holdings.begin_free(self._clock())
        if due:
            self._start(self._free(due))
        self._arm()

    async def _free(self, cells: Cells) -> None:
        """Frees what is there of `cells`, however many tries it takes: calls need the rest meanwhile, not these."""
        for layer, expert_ids in by_layer(cells).items():
            while True:
                try:
                    await self._thread.run(self._experts.remove, layer, expert_ids)
                    break
                except Exception as error:
                    if not is_out_of_memory(error):
                        logger.exception("experts %s of layer %d stay in memory", describe_units(expert_ids), layer)
                        break
                    await asyncio.sleep(FREE_RETRY)
        await self._device.run(lambda: None)  # the calls that were checked before have been computed now
        await self._thread.run(give_back, self._experts.device)
        self._experts.holdings.finish_free(cells)
        self._changed.set()


def _outcome(error: BaseException) -> str:
    if isinstance(error, Cancelled):
        return "cancelled"
    return "no_room" if isinstance(error, GrokmoeError) and error.reason is Reason.NO_ROOM else "failed"


def _draining() -> Unavailable:
    return Unavailable("the worker is about to end", reason=Reason.SHUTTING_DOWN)
