"""A server that speaks the protocol and answers at known times; it computes nothing.

As a program, `python -m tests.loadtest.echo FIRST GAP`: prints its address and serves until standard input ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import sys
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from grokmoe.errors import GrokmoeError
from grokmoe.server import RoleServer, Service, server_stream, unary
from grokmoe.target import SERVICE
from grokmoe.v1 import generation_pb2 as pb

VOCAB_SIZE, CONTEXT = 1000, 100_000


@dataclasses.dataclass
class Echo:
    """first: seconds to the first token. gap: to each further one. slots: requests served at once; None: all.

    error_of: what a request of this name ends with; None: an answer.
    """

    first: float = 0.0
    gap: float = 0.0
    slots: int | None = None
    error_of: Callable[[str], GrokmoeError | None] = lambda name: None
    stalls_until: float = 0.0
    names: list[str] = dataclasses.field(default_factory=list)
    num_left: int = 0

    def __post_init__(self) -> None:
        self._turns = asyncio.Semaphore(self.slots) if self.slots else contextlib.nullcontext()

    def stall(self, seconds: float) -> None:
        """No token leaves for so long."""
        self.stalls_until = time.monotonic() + seconds

    async def _pause(self, until: float) -> None:
        await asyncio.sleep(max(0.0, until - time.monotonic()))
        while (rest := self.stalls_until - time.monotonic()) > 0:  # noqa: ASYNC110 - it may be prolonged
            await asyncio.sleep(rest)

    async def StreamGenerate(
        self, request: pb.StreamGenerateRequest, context: Any
    ) -> AsyncIterator[pb.StreamGenerateResponse]:
        asked = request.generate
        self.names.append(asked.request_id)
        if error := self.error_of(asked.request_id):
            raise error
        arrival = time.monotonic()
        num = asked.stopping.max_tokens
        ended = False
        try:
            async with self._turns:
                begin = time.monotonic()
                for index in range(num):
                    await self._pause(begin + self.first + index * self.gap)
                    message = pb.StreamGenerateResponse(request_id=asked.request_id, token_ids=[index])
                    message.usage.prompt_tokens = len(asked.token_ids.ids) or len(asked.text)
                    message.usage.completion_tokens = index + 1
                    if index + 1 == num:
                        message.finish_reason = pb.FINISH_REASON_LENGTH
                        message.timing.queue_seconds = begin - arrival
                    yield message
            ended = True
        finally:
            self.num_left += not ended

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:
        answer = pb.GenerateResponse(request_id=request.request_id)
        answer.candidates.add(token_ids=[1], finish_reason=pb.FINISH_REASON_LENGTH)
        return answer

    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        words = request.text.split()
        return pb.TokenizeResponse(token_ids=range(len(words)), pieces=words)

    async def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:
        return pb.GetModelResponse(name="echo", config_hash="e", vocab_size=VOCAB_SIZE, context_length=CONTEXT)

    def as_service(self) -> Service:
        stream = server_stream(self.StreamGenerate, pb.StreamGenerateRequest, pb.StreamGenerateResponse)
        return Service(
            SERVICE,
            {
                "StreamGenerate": stream,
                "Generate": unary(self.Generate, pb.GenerateRequest, pb.GenerateResponse),
                "Tokenize": unary(self.Tokenize, pb.TokenizeRequest, pb.TokenizeResponse),
                "GetModel": unary(self.GetModel, pb.GetModelRequest, pb.GetModelResponse),
            },
        )


@contextlib.asynccontextmanager
async def serving(echo: Echo) -> AsyncIterator[str]:
    """Its address."""
    server = RoleServer([echo.as_service()])
    address = await server.start("127.0.0.1:0")
    await server.set_ready(True)
    try:
        yield address
    finally:
        await server.stop(0)


@contextlib.asynccontextmanager
async def process(first: float, gap: float) -> AsyncIterator[str]:
    """Its address, of one in a process of its own, whose loop nobody else holds up."""
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.loadtest.echo",
        str(first),
        str(gap),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        yield (await child.stdout.readline()).decode().strip()
    finally:
        child.stdin.close()
        await child.wait()


async def main() -> None:
    async with serving(Echo(float(sys.argv[1]), float(sys.argv[2]))) as address:
        print(address, flush=True)  # noqa: T201
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main())
