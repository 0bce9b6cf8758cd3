"""The thread that computes: order, errors, cancellation, and an event loop that has gone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from grokmoe.device_thread import DeviceThread


@pytest.fixture
def device() -> Iterator[DeviceThread]:
    device = DeviceThread("test-device")
    yield device
    device.stop()


def test_work_is_done_in_order_and_on_one_thread(device: DeviceThread) -> None:
    seen: list[tuple[int, str]] = []

    def work(number: int) -> int:
        seen.append((number, threading.current_thread().name))
        return number * 2

    async def main() -> list[int]:
        futures = [device.run(work, number) for number in range(20)]
        device.post(lambda: seen.append((20, threading.current_thread().name)))
        return [*await asyncio.gather(*futures), await device.run(work, 21)]

    assert asyncio.run(main()) == [*range(0, 40, 2), 42]
    assert seen == [(number, "test-device") for number in range(22)]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt("no"), SystemExit(3)])
def test_an_error_reaches_who_waits_and_nobody_else(device: DeviceThread, error: BaseException) -> None:
    def fail() -> None:
        raise error

    async def main() -> BaseException | None:
        failing, fine = device.run(fail), device.run(lambda: 1)
        assert await fine == 1
        return failing.exception()

    assert asyncio.run(main()) is error
    with pytest.raises(type(error)):
        device.call(fail)
    assert device.call(lambda: 2) == 2


def test_cancelled_work_that_has_not_begun_is_skipped(device: DeviceThread) -> None:
    begun, go_on = threading.Event(), threading.Event()
    seen: list[str] = []

    def first() -> None:
        begun.set()
        go_on.wait(10)
        seen.append("first")

    async def main() -> None:
        running = device.run(first)
        waiting = device.run(seen.append, "second")
        last = device.run(seen.append, "third")
        await asyncio.get_running_loop().run_in_executor(None, begun.wait, 10)
        assert device.num_waiting == 2
        running.cancel()
        waiting.cancel()
        go_on.set()
        await last

    asyncio.run(main())
    assert seen == ["first", "third"], "what has begun is finished"


def test_a_loop_that_has_closed_does_not_hurt(device: DeviceThread) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow() -> None:
        begun.set()
        go_on.wait(10)

    async def leave() -> None:
        device.run(slow)
        await asyncio.get_running_loop().run_in_executor(None, begun.wait, 10)

    asyncio.run(leave())
    go_on.set()
    assert device.call(lambda: "alive") == "alive"


def test_stop_finishes_what_was_handed_over() -> None:
    device, seen = DeviceThread(), []
    for number in range(5):
        device.post(lambda number=number: seen.append(number))
    device.stop()
    assert seen == [0, 1, 2, 3, 4]
