"""Streams take turns, in order, and leave the loop to others between two slices."""

from __future__ import annotations

import asyncio
import itertools

from router.outbox import Outbox


def test_in_order_and_each_once() -> None:
    async def main() -> None:
        sent: list[int] = []
        outbox = Outbox(clock=lambda: 0.0)
        for number in range(5):
            outbox.add(lambda number=number: sent.append(number))
        assert sent == []
        await asyncio.sleep(0)
        assert sent == [0, 1, 2, 3, 4]
        await asyncio.sleep(0)
        assert sent == [0, 1, 2, 3, 4]

    asyncio.run(main())


def test_others_run_between_two_slices() -> None:
    async def main() -> None:
        ticks = itertools.count()  # every look at the clock finds it one second later
        outbox = Outbox(slice_seconds=2.0, clock=lambda: float(next(ticks)))
        order: list[str] = []
        for number in range(5):
            outbox.add(lambda number=number: order.append(f"sent {number}"))
        asyncio.get_running_loop().call_soon(order.append, "other")
        for _ in range(4):
            await asyncio.sleep(0)
        assert order == ["sent 0", "sent 1", "other", "sent 2", "sent 3", "sent 4"]

    asyncio.run(main())


def test_who_is_added_by_another_has_a_turn() -> None:
    async def main() -> None:
        sent: list[str] = []
        outbox = Outbox(slice_seconds=0.0)

        def first() -> None:
            sent.append("first")
            outbox.add(lambda: sent.append("second"))

        outbox.add(first)
        await asyncio.sleep(0)
        assert sent == ["first"]
        await asyncio.sleep(0)
        assert sent == ["first", "second"]

    asyncio.run(main())
