"""The one thread that computes. The event loop hands it work and awaits the result; it never computes itself."""

from __future__ import annotations

import asyncio
import concurrent.futures
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class DeviceThread:
    """Runs callables one after another, in the order they were handed over.

    `concurrent.futures` would do the same with two locks and a condition per call; this hand-over is on the path of
    every layer of every step.
    """

    def __init__(self, name: str = "device") -> None:
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)
        self._thread.start()

    def _loop(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()

    @property
    def num_waiting(self) -> int:
        """Tasks handed over and not begun."""
        return self._tasks.qsize()

    def post(self, task: Callable[[], None]) -> None:
        """Runs `task` on the thread. It must not raise."""
        self._tasks.put(task)

    def run(self, function: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        """Runs `function(*args)` on the thread. The future belongs to the running event loop.

        A cancelled future does not stop work that has begun; work that has not begun is skipped.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def settle(result: T | None, error: BaseException | None) -> None:
            if future.cancelled():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]

        def task() -> None:
            if future.cancelled():
                return
            try:
                result, error = function(*args), None
            except BaseException as raised:
                result, error = None, raised
            try:
                loop.call_soon_threadsafe(settle, result, error)
            except RuntimeError:  # the loop is closed: nobody waits any more
                return

        self._tasks.put(task)
        return future

    def call(self, function: Callable[..., T], *args: Any) -> T:
        """Runs `function(*args)` on the thread and waits for it. For start-up, where there is no event loop yet."""
        outcome: concurrent.futures.Future[T] = concurrent.futures.Future()

        def task() -> None:
            try:
                outcome.set_result(function(*args))
            except BaseException as raised:
                outcome.set_exception(raised)

        self._tasks.put(task)
        return outcome.result()

    def stop(self) -> None:
        """Ends the thread after the work handed over so far."""
        self._tasks.put(None)
        self._thread.join()
