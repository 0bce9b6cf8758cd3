"""The process that sends messages back."""

from __future__ import annotations

import asyncio

from benchmarks.echo import Echo


def test_messages_of_any_size_come_back_both_ways() -> None:
    async def main() -> list[float]:
        async with Echo() as echo:
            sizes = (1, 1 << 20)
            return [*map(echo.socket_seconds, sizes), *[await echo.grpc_seconds(size) for size in sizes]]

    assert all(seconds > 0 for seconds in asyncio.run(main()))
