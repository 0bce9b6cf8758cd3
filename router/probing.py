"""The way back: asks a worker that was lost, again and again, until it answers. The same for every role."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Awaitable, Callable

from grokmoe.errors import ConfigError, GrokmoeError

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ProbeSettings:
    """Named limits, seconds."""

    first_pause: float = 0.1
    """Before the first attempt: most losses are restarts or broken connections, and are over soon."""
    max_pause: float = 2.0
    """The pause doubles up to this one. It is how late the return of a worker may be noticed."""
    dead_after: float = 30.0
    """Away for so long a worker is called dead. It is still probed: only an operator can say that it is gone."""
    stable_after: float = 10.0
    """A worker lost again sooner than this after its return goes on with the pause it had: one that answers probes
    and fails calls must not take a call down every tenth of a second."""

    def pause(self, num_attempts: int) -> float:
        """Seconds before the attempt that follows `num_attempts` failed ones."""
        return min(self.first_pause * 2.0 ** min(num_attempts, 60), self.max_pause)


class Prober:
    """One worker's way back. `start` when it is lost, `stop` when nobody wants it any more."""

    def __init__(
        self,
        connect: Callable[[], Awaitable[None]],
        settings: ProbeSettings,
        on_back: Callable[[], None],
        name: str,
        on_dead: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """connect: asks the worker what it is and takes it in; raises Unavailable or TimeoutError while it is away or
        draining, ConfigError when what answers does not fit.
        on_back: called once after an attempt has succeeded; the prober rests then.
        on_dead: called once when it has been away for `dead_after`.
        name: for the log, such as "expert worker 3 at host:port".
        """
        self._connect, self._settings, self._on_back, self._on_dead = connect, settings, on_back, on_dead
        self._name, self._clock = name, clock
        self._task: asyncio.Task[None] | None = None
        self._num_attempts = 0
        self._back_at: float | None = None
        self._refusal = ""

    @property
    def is_running(self) -> bool:
        """Whether it is looking for its worker."""
        return self._task is not None

    def start(self) -> None:
        """Begins to look for the worker. Harmless when it does already."""
        if self._task is not None:
            return
        if self._back_at is None or self._clock() - self._back_at >= self._settings.stable_after:
            self._num_attempts = 0
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"probe {self._name}")

    def stop(self) -> None:
        """Gives up. Harmless when it rests."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()

    async def _run(self) -> None:
        lost_at, is_dead = self._clock(), False
        while True:
            await asyncio.sleep(self._settings.pause(self._num_attempts))
            self._num_attempts += 1
            if await self._attempt():
                break
            if not is_dead and self._clock() - lost_at >= self._settings.dead_after:
                is_dead = True
                logger.warning("%s has been away for %.0f s", self._name, self._clock() - lost_at)
                if self._on_dead is not None:
                    self._on_dead()
        logger.info("%s is back after %.1f s", self._name, self._clock() - lost_at)
        self._task, self._back_at, self._refusal = None, self._clock(), ""
        self._on_back()

    async def _attempt(self) -> bool:
        try:
            await self._connect()
        except ConfigError as error:
            # Another model at the same address is no passing trouble: somebody has to act. Said once.
            if str(error) != self._refusal:
                logger.warning("%s cannot be used: %s", self._name, error)
            self._refusal = str(error)
        except (GrokmoeError, TimeoutError) as error:
            logger.debug("%s is still away: %s", self._name, error)
        except Exception:
            logger.exception("probing %s failed", self._name)
        else:
            return True
        return False
