"""The servers behind the gateway, in a file that it watches: those that a name or another file has now."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path

from router.discovery import Sources

INTERVAL = 1.0
"""Seconds between two looks."""

MANIFEST_VERSION = 1


def manifest(addresses: Sequence[str]) -> str:
    """What the gateway reads."""
    workers = [{"id": address, "url": f"grpc://{address}"} for address in addresses]
    return json.dumps({"version": MANIFEST_VERSION, "workers": workers})


def follow(sources: Sources, path: Path) -> threading.Thread:
    """Keeps the file as `sources` says, on a thread that ends with the process. Until somebody is found it is not
    there, which the gateway puts up with."""
    thread = threading.Thread(target=lambda: asyncio.run(_follow(sources, path)), name="servers", daemon=True)
    thread.start()
    return thread


async def _follow(sources: Sources, path: Path) -> None:
    written: list[str] = []
    while True:
        found = await sources.find()
        if found and found != written:
            # Written beside and renamed: it is never read half.
            beside = path.with_name(f"{path.name}.part")
            beside.write_text(manifest(found))
            os.replace(beside, path)
            written = found
        await asyncio.sleep(INTERVAL)
