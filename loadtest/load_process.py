"""A load process, `python -m loadtest.load_process`: frames in on standard input, frames out on standard output.

    in:  Job             out: READY when the server answers
    in:  Go              out: Counts every now and then, at last the records
    in:  Go, again, ...  and the end of standard input ends the process

Between the first request and the last it sends nothing but counts, so that reporting disturbs no measurement.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import selectors
import sys

from grokmoe import AsyncClient
from loadtest import frames
from loadtest.job import Go, Job
from loadtest.sender import Sender

COUNTS_INTERVAL = 0.5
"""Seconds between two words on progress."""

READY = "ready"

READ_LIMIT = 1 << 20
"""Bytes of standard input that are held before somebody reads them."""


async def serve(output: int) -> None:
    """Until standard input ends. output: descriptor that frames are written to."""
    reader = asyncio.StreamReader(READ_LIMIT)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    with contextlib.suppress(asyncio.IncompleteReadError):
        job: Job = await frames.read(reader)
        async with AsyncClient(job.address, **job.client) as client:
            await client.model()  # opens the connection; the first request is not to pay for it
            _write(output, READY)
            sender = Sender(client, job)
            while True:
                await _serve_one(await frames.read(reader), sender, reader, output)


async def _serve_one(go: Go, sender: Sender, reader: asyncio.StreamReader, output: int) -> None:
    gc.collect()
    gc.freeze()  # the plan is not looked through again during the run
    running = asyncio.ensure_future((sender.run_closed if go.is_closed else sender.run)(go.plan, go.begin))
    try:
        while not (await asyncio.wait((running,), timeout=COUNTS_INTERVAL))[0]:
            if reader.at_eof():  # whoever wanted this is gone
                return
            _write(output, sender.counts)
        _write(output, running.result())
    finally:
        running.cancel()


def _write(output: int, value: object) -> None:
    data = frames.encode(value)
    while data:
        data = data[os.write(output, data) :]


def main() -> None:
    """See the module's docstring."""
    # Whatever prints, prints to standard error: standard output is for frames.
    output = os.dup(1)
    os.dup2(2, 1)
    # select() takes its timeout in microseconds, epoll in milliseconds, rounded up: half a millisecond of lag on the
    # average. There are three descriptors to watch here; gRPC has its own.
    selector = selectors.SelectSelector()
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector)) as runner:
        runner.run(serve(output))


if __name__ == "__main__":
    main()
