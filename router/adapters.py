"""LoRA adapters of the cluster: loaded by all attention workers, brought to those that come, taken out of all.

A worker has an adapter or it does not, and requests go only to those that have theirs. So what a worker cannot load
costs it those requests and no others. Contents are told apart by id: a name that stands for another content on one
worker is not that adapter.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol

from grokmoe.adapter import AdapterInfo, check_adapter_name
from grokmoe.errors import FailedPrecondition, GrokmoeError, Reason, Unavailable
from router.adapter_table import AdapterTable
from router.transport.base import AttentionInfo, AttentionLink
from router.worker_state import WorkerState

logger = logging.getLogger(__name__)


class Holder(Protocol):
    """An attention worker, see router.cell. adapter_ids: those that it has."""

    link: AttentionLink
    state: WorkerState
    adapter_ids: set[str]

    @property
    def name(self) -> str:
        """For logs and errors."""


class Adapters:
    """One engine's. table: which there are."""

    def __init__(self, holders: Callable[[], Sequence[Holder]]) -> None:
        """holders: all attention workers, in use or not."""
        self.table = AdapterTable()
        self._holders = holders
        self._turn = asyncio.Lock()
        self._news = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()

    async def load(self, name: str) -> AdapterInfo:
        """Has every worker in use load it; requests that name it get what they loaded. See Control.LoadAdapter.

        Raises what the first worker refuses with, FailedPrecondition when workers find different contents; then nothing
        has changed. A caller that goes away does not end it.
        """
        check_adapter_name("name", name)
        return await asyncio.shield(self._start(self._load(name)))

    async def unload(self, name: str) -> float:
        """Takes it out: new requests cannot name it, and workers forget it when no sequence with it is alive.

        Returns seconds until then. Raises NotFound; FailedPrecondition when it was loaded again meanwhile. A caller
        that goes away does not end it.
        """
        begin = time.monotonic()
        info = self.table.retire("name", name)
        logger.info("adapter %s takes no new requests", name)
        if not await asyncio.shield(self._start(self._see_off(info))):
            raise FailedPrecondition(f"adapter {name} was loaded again before its last request had ended")
        return time.monotonic() - begin

    async def bring(self, link: AttentionLink, info: AttentionInfo) -> AttentionInfo:
        """Sees to it that a worker that comes has the adapters there are, and that those it has brought are known.

        Returns what it says of itself then. Raises Unavailable when it is lost meanwhile.
        """
        held = {each.id for each in info.adapters}
        is_other = False
        for each in info.adapters:
            if self.table.is_dismissed(each.id):
                await link.unload_adapter(each.id)
                is_other = True
            elif self.table.get(each.name) is None and not self.table.is_leaving(each.id):
                self.table.serve(each)
                self._start(self._spread())  # to the others
        for name in dict.fromkeys(
            each.name for each in (*self.table.served, *self.table.leaving) if each.id not in held
        ):
            is_other |= await self._try_to_load(link, name) is not None
        # Loading may have taken longer than a lease lasts, see attention_worker/lease.py.
        return await link.describe() if is_other else info

    async def settle(self) -> None:
        """Waits until what workers brought at start has been brought to the others."""
        await self._spread()

    def adopted(self, holder: Holder) -> None:
        """A worker is in use with what `bring` has found: what was loaded since then is still to come."""
        if any(info.id not in holder.adapter_ids for info in self.table.served):
            self._start(self._spread())

    def ended(self) -> None:
        """A sequence with an adapter is over."""
        self._news.set()

    def workers_with(self, adapter_id: str) -> int:
        """Workers in use that have it."""
        return sum(adapter_id in holder.adapter_ids for holder in self._in_use())

    async def close(self) -> None:
        """Ends what is under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _in_use(self) -> list[Holder]:
        return [holder for holder in self._holders() if holder.state is WorkerState.READY]

    def _start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # looked at: whoever waited for it may be gone

    async def _load(self, name: str) -> AdapterInfo:
        async with self._turn:
            holders = self._in_use()
            if not holders:
                raise Unavailable("no attention worker is in use", reason=Reason.WORKER_UNAVAILABLE)
            answers = await asyncio.gather(*(each.link.load_adapter(name) for each in holders), return_exceptions=True)
            loaded = [(each, got) for each, got in zip(holders, answers, strict=True) if isinstance(got, AdapterInfo)]
            try:
                info = _agreed(name, holders, answers)
            except GrokmoeError:
                for holder, got in loaded:
                    if not self.table.is_known(got.id):
                        await self._forget(holder, got.id)
                raise
            for holder, _ in loaded:
                holder.adapter_ids.add(info.id)
            before = self.table.serve(info)
            logger.info("adapter %s is loaded by %d workers: %s", name, len(loaded), info.id)
        if before is not None:
            self._start(self._see_off(before))
        return info

    async def _see_off(self, info: AdapterInfo) -> bool:
        """Waits for its last sequence, then has the workers forget it. False: it has come back meanwhile."""
        while self.table.is_leaving(info.id) and self.table.num_sequences(info.id):
            self._news.clear()
            await self._news.wait()
        async with self._turn:
            if not self.table.dismiss(info.id):
                return False
            for holder in self._in_use():
                await self._forget(holder, info.id)
        logger.info("adapter %s has left: %s", info.name, info.id)
        return True

    async def _forget(self, holder: Holder, adapter_id: str) -> None:
        """A worker that cannot be reached is told when it comes back."""
        holder.adapter_ids.discard(adapter_id)
        try:
            await holder.link.unload_adapter(adapter_id)
        except GrokmoeError as error:
            logger.warning("%s does not forget adapter %s: %s", holder.name, adapter_id, error.message)

    async def _spread(self) -> None:
        """Brings every adapter to every worker in use."""
        async with self._turn:
            for holder in self._in_use():
                for info in self.table.served:
                    if info.id not in holder.adapter_ids:
                        with contextlib.suppress(Unavailable):  # it gets it when it comes back
                            if await self._try_to_load(holder.link, info.name) == info.id:
                                holder.adapter_ids.add(info.id)

    async def _try_to_load(self, link: AttentionLink, name: str) -> str | None:
        """The id of what a worker has under a name, if there is such an adapter. Raises Unavailable when it is lost."""
        try:
            got = await link.load_adapter(name)
        except Unavailable:
            raise
        except GrokmoeError as error:
            logger.warning("%s gets no requests with adapter %s: %s", link.address, name, error.message)
            return None
        if self.table.is_known(got.id):
            return got.id
        logger.warning(
            "%s gets no requests with adapter %s: it has another content under this name", link.address, name
        )
        await link.unload_adapter(got.id)
        return None


def _agreed(name: str, holders: Sequence[Holder], answers: Sequence[Any]) -> AdapterInfo:
    """What all have loaded. A worker that was lost meanwhile is told when it comes back, if there is another.

    Raises what one refuses with.
    """
    loaded = [each for each in answers if isinstance(each, AdapterInfo)]
    for holder, answer in zip(holders, answers, strict=True):
        if isinstance(answer, Unavailable) and loaded:
            continue
        if isinstance(answer, BaseException):
            logger.warning("%s does not load adapter %s: %s", holder.name, name, answer)
            raise answer
    if len({info.id for info in loaded}) > 1:
        found = ", ".join(
            f"{answer.id} at {holder.link.address}"
            for holder, answer in zip(holders, answers, strict=True)
            if isinstance(answer, AdapterInfo)
        )
        raise FailedPrecondition(
            f"workers have different adapters under the name {name}: {found}", reason=Reason.ADAPTER_REFUSED
        )
    return loaded[0]
