"""One call through either client, for tests that hold for both."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable
from typing import Any

from grokmoe import AsyncClient, Client

Ask = Callable[..., Any]
"""(address, method, *arguments, client=options of the client, **options of the call) -> answer, or list of deltas."""


def ask_sync(address: Any, method: str, *args: Any, client: dict[str, Any] | None = None, **options: Any) -> Any:
    """Through Client. Nothing is tried again unless `client` says so."""
    with Client(address, **{"retries": 0, **(client or {})}) as connected:
        answer = getattr(connected, method)(*args, **options)
        return list(answer) if method == "stream" else answer


def ask_async(address: Any, method: str, *args: Any, client: dict[str, Any] | None = None, **options: Any) -> Any:
    """Through AsyncClient. Nothing is tried again unless `client` says so."""

    async def main() -> Any:
        async with AsyncClient(address, **{"retries": 0, **(client or {})}) as connected:
            answer = getattr(connected, method)(*args, **options)
            return [delta async for delta in answer] if method == "stream" else await answer

    return asyncio.run(main())


def in_background(call: Callable[[], Any]) -> concurrent.futures.Future[Any]:
    """Runs a blocking call in a thread."""
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def main() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=main).start()
    return future
