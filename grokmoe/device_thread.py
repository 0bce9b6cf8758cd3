"""The one thread that computes. The event loop hands it work and awaits the result; it never computes itself."""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

EXIT_TIMEOUT = 10.0
"""Seconds that the task under way has to end when the process does; what it computes is for nobody any more."""


class DeviceThread:
    """Runs callables one after another, in the order they were handed over.

    `concurrent.futures` would do the same with two locks and a condition per call; this hand-over is on the path of
    every layer of every step.
    """

    def __init__(self, name: str = "device") -> None:
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)
        self._is_ending = False
        # A thread that comes back from torch when the interpreter is gone is unwound through frames that may not be,
        # and the whole process aborts. Not a thread that is no daemon: the process would wait for it before this runs.
        atexit.register(self._end)
        self._thread.start()

    def _loop(self) -> None:
        while (task := self._tasks.get()) is not None and not self._is_ending:
            task()
        if not self._is_ending:
            atexit.unregister(self._end)

    def _end(self) -> None:
        """At the end of the process: lets the task under way finish and drops the others."""
        self._is_ending = True
        self._tasks.put(None)
        self._thread.join(EXIT_TIMEOUT)

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

    def leave(self) -> None:
        """Ends the thread after the work handed over so far, and does not wait for that."""
        self._tasks.put(None)

    def stop(self) -> None:
        """Ends the thread after the work handed over so far."""
        self.leave()
        self._thread.join()
